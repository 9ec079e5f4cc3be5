// linear_sm90.h on the host: what CUTLASS is told of a problem. Kernel::run is never named, so no kernel is compiled.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "../linear_sm90.h"

namespace gain_ops::sm90 {
namespace {

// The arguments of any instantiation in one type, so that the checks are compiled once.
struct Packed {
  bool gemm_mode, elements_agree;
  int64_t tile_m, tile_n, tile_k, cluster_m, cluster_n;
  int64_t m, n, k, batches;
  const void *a, *b, *c, *out, *delta, *bias = nullptr, *z = nullptr, *partials = nullptr;
  int64_t a_stride, a_step, b_n_step, b_k_step, c_stride, c_step, out_stride, out_step, z_stride = 0, z_step = 0;
  int64_t batch_strides;
  float null_bias = 0, identity = 0;
  int device, multiprocessors;
  int swizzle;
};

template <class Element, Epilogue kEpilogue, Tile kTile, bool kBIsKn>
Packed pack(const LinearProblem& problem) {
  using K = Kernel<Element, kEpilogue, kTile, kBIsKn>;
  using Gemm = typename K::Gemm;
  using TileShape = typename K::GemmKernel::TileShape;
  using ClusterShape = typename K::GemmKernel::ClusterShape;
  const typename Gemm::Arguments arguments = K::arguments(problem);
  const auto& [mode, shape, mainloop, epilogue, hardware, scheduler] = arguments;
  const auto& tree = epilogue.thread;

  Packed p;
  p.gemm_mode = mode == cutlass::gemm::GemmUniversalMode::kGemm;
  p.elements_agree =
      std::is_same_v<typename Gemm::ElementA, Element> && std::is_same_v<typename Gemm::ElementB, Element> &&
      std::is_same_v<typename Gemm::ElementD, Element> && std::is_same_v<typename Gemm::ElementAccumulator, float>;
  p.tile_m = size<0>(TileShape{}), p.tile_n = size<1>(TileShape{}), p.tile_k = size<2>(TileShape{});
  p.cluster_m = size<0>(ClusterShape{}), p.cluster_n = size<1>(ClusterShape{});
  p.m = get<0>(shape), p.n = get<1>(shape), p.k = get<2>(shape), p.batches = get<3>(shape);
  p.a = mainloop.ptr_A, p.b = mainloop.ptr_B, p.c = epilogue.ptr_C, p.out = epilogue.ptr_D;
  p.a_stride = get<0>(mainloop.dA), p.a_step = get<1>(mainloop.dA);
  p.b_n_step = get<0>(mainloop.dB), p.b_k_step = get<1>(mainloop.dB);
  p.c_stride = get<0>(epilogue.dC), p.c_step = get<1>(epilogue.dC);
  p.out_stride = get<0>(epilogue.dD), p.out_step = get<1>(epilogue.dD);
  p.batch_strides = get<2>(mainloop.dA) | get<2>(mainloop.dB) | get<2>(epilogue.dC) | get<2>(epilogue.dD);
  if constexpr (kEpilogue == Epilogue::linear || kEpilogue == Epilogue::linear_z) {
    p.delta = tree.op_0.ptr_row;
    p.bias = tree.op_2.ptr_row;
    p.null_bias = static_cast<float>(tree.op_2.null_default);
    if constexpr (kEpilogue == Epilogue::linear_z) {
      const auto& store = tree.op_1.op_1;
      p.z = store.ptr_aux, p.z_stride = get<0>(store.dAux), p.z_step = get<1>(store.dAux);
    }
  } else {
    p.delta = tree.op_0.op_0.ptr_row;
    p.partials = tree.op_1.op_1.ptr_row;
    p.identity = tree.op_1.op_1.reduction_identity;
  }
  p.device = hardware.device_id, p.multiprocessors = hardware.sm_count;
  p.swizzle = scheduler.max_swizzle_size;
  return p;
}

struct Instance {
  Epilogue epilogue;
  Tile tile;
  bool b_is_kn;
  Packed (*pack)(const LinearProblem&);
  size_t (*workspace)(const LinearProblem&);
  bool (*can_run)(const LinearProblem&);
};

template <class Element, Epilogue kEpilogue, Tile kTile, bool kBIsKn>
Instance instance() {
  using K = Kernel<Element, kEpilogue, kTile, kBIsKn>;
  return {kEpilogue, kTile, kBIsKn, pack<Element, kEpilogue, kTile, kBIsKn>, K::workspace, K::can_run};
}

template <class Element, Epilogue... kEpilogues>
void append(std::vector<Instance>& all) {
  (all.insert(
       all.end(), {instance<Element, kEpilogues, Tile::large_128x256, false>(),
                   instance<Element, kEpilogues, Tile::large_128x256, true>(),
                   instance<Element, kEpilogues, Tile::small_128x128, false>(),
                   instance<Element, kEpilogues, Tile::small_128x128, true>()}),
   ...);
}

std::vector<Instance> instances() {
  std::vector<Instance> all;
  append<cutlass::bfloat16_t, Epilogue::linear, Epilogue::linear_z, Epilogue::recompute, Epilogue::input>(all);
  append<cutlass::half_t, Epilogue::linear, Epilogue::linear_z, Epilogue::recompute, Epilogue::input>(all);
  return all;
}

// No two fields alike, no stride within 32 bits.
LinearProblem problem(bool b_is_kn) {
  const auto address = [](uintptr_t value) { return reinterpret_cast<void*>(value); };
  constexpr int64_t kFar = int64_t{1} << 33;
  return {
      address(0x1000),
      address(0x2000),
      address(0x3000),
      static_cast<float*>(address(0x4000)),
      address(0x5000),
      address(0x6000),
      address(0x7000),
      static_cast<float*>(address(0x8000)),
      300,
      520,
      264,
      kFar + 8,
      kFar + 16,
      kFar + 24,
      b_is_kn,
      3,
      114};
}

TEST_CASE("arguments: every field of every instantiation") {
  for (const Instance& instance : instances()) {
    CAPTURE(static_cast<int>(instance.epilogue));
    CAPTURE(static_cast<int>(instance.tile));
    CAPTURE(instance.b_is_kn);
    const bool linear_z = instance.epilogue == Epilogue::linear_z;
    const bool reduces = instance.epilogue == Epilogue::recompute || instance.epilogue == Epilogue::input;
    const LinearProblem p = problem(instance.b_is_kn);
    const Packed packed = instance.pack(p);

    CHECK(packed.gemm_mode);
    CHECK(packed.elements_agree);
    // The partial sums and the choice of a tile in plan.h rest on these.
    const TileShape tile = tile_shape(instance.tile);
    CHECK(packed.tile_m == tile.m);
    CHECK(packed.tile_n == tile.n);
    CHECK(packed.tile_k == 64);
    CHECK(packed.cluster_m == tile.cluster_m);
    CHECK(packed.cluster_n == 1);

    CHECK(packed.m == p.m);
    CHECK(packed.n == p.n);
    CHECK(packed.k == p.k);
    CHECK(packed.batches == 1);

    CHECK(packed.a == p.a);
    CHECK(packed.b == p.b);
    CHECK(packed.c == (reduces ? p.c : nullptr));
    CHECK(packed.out == p.out);
    CHECK(packed.delta == p.delta);
    CHECK(packed.bias == (reduces ? nullptr : p.bias));
    CHECK(packed.z == (linear_z ? p.z : nullptr));
    CHECK(packed.partials == (reduces ? p.partials : nullptr));

    CHECK(packed.a_stride == p.a_stride);
    CHECK(packed.a_step == 1);
    CHECK(packed.b_n_step == (p.b_is_kn ? 1 : p.b_stride));
    CHECK(packed.b_k_step == (p.b_is_kn ? p.b_stride : 1));
    CHECK(packed.c_step == 1);
    if (reduces) CHECK(packed.c_stride == p.c_stride);
    CHECK(packed.out_stride == p.n);
    CHECK(packed.out_step == 1);
    CHECK(packed.z_stride == (linear_z ? p.n : 0));
    CHECK(packed.z_step == (linear_z ? 1 : 0));
    CHECK(packed.batch_strides == 0);  // unused, but TMA refuses any that is not a multiple of 16 bytes

    CHECK(packed.identity == 0);
    CHECK(packed.device == p.device);
    CHECK(packed.multiprocessors == p.multiprocessors);
    CHECK(packed.swizzle == choose_swizzle(p.m, p.n, p.multiprocessors, instance.tile));
  }
}

TEST_CASE("choose_swizzle: CUTLASS's own scheduler adds no wave, and would add one for any wider walk") {
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90Params;
  int64_t wrong = 0, narrower = 0;
  for (Tile tile : {Tile::large_128x256, Tile::small_128x128}) {
    const TileShape shape = tile_shape(tile);
    for (int multiprocessors : {78, 114, 117, 132}) {
      const auto scheduled = [&](int m, int n, int swizzle) {
        cutlass::KernelHardwareInfo hardware;
        hardware.sm_count = multiprocessors;
        Scheduler scheduler;
        scheduler.initialize(
            cutlass::gemm::BatchedGemmCoord(m, n, 64, 1),
            cutlass::gemm::GemmCoord(static_cast<int>(shape.m), static_cast<int>(shape.n), 64),
            cutlass::gemm::GemmCoord(static_cast<int>(shape.cluster_m), 1, 1), hardware, swizzle,
            Scheduler::RasterOrderOptions::Heuristic);
        return scheduler;
      };
      const auto waves = [&](const Scheduler& scheduler) {
        return ceil_div(static_cast<int64_t>(scheduler.blocks_per_problem_), resident_blocks(multiprocessors, tile));
      };
      for (int m = 1; m <= 8192; m += 127) {
        for (int n : {8, 640, 1280, 2560, 4096, 5120, 11008, 14336, 28672}) {
          const int width = choose_swizzle(m, n, multiprocessors, tile);
          const Scheduler none = scheduled(m, n, 1), chosen = scheduled(m, n, width),
                          wider = scheduled(m, n, 2 * width);
          wrong += waves(chosen) != waves(none);
          narrower += wider.log_swizzle_size_ > chosen.log_swizzle_size_ && waves(wider) == waves(none);
        }
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(narrower == 0);
}

template <Epilogue kEpilogue, Tile kTile>
void check_refused(int64_t LinearProblem::* stride) {
  using K = Kernel<cutlass::bfloat16_t, kEpilogue, kTile, false>;
  LinearProblem p = problem(false);
  p.*stride = 9;
  CHECK_THROWS_WITH_AS(
      K::GemmKernel::to_underlying_arguments(K::arguments(p), nullptr),
      doctest::Contains("could not be set up: cuTensorMapEncodeTiled failed with CUresult"), std::runtime_error);
}

TEST_CASE("a tensor map that cannot be encoded is an error") {  // without a driver none can be
  check_refused<Epilogue::linear_z, Tile::large_128x256>(&LinearProblem::a_stride);
  check_refused<Epilogue::input, Tile::small_128x128>(&LinearProblem::c_stride);
}

TEST_CASE("arguments: no bias is a zero bias") {
  for (const Instance& instance : instances()) {
    LinearProblem p = problem(instance.b_is_kn);
    p.bias = nullptr;
    const Packed packed = instance.pack(p);
    CHECK(packed.bias == nullptr);
    CHECK(packed.null_bias == 0);
  }
}

TEST_CASE("can_run: any m, and n and k in steps of 16 bytes") {
  const int64_t most = std::numeric_limits<int>::max();
  for (const Instance& instance : instances()) {
    CAPTURE(static_cast<int>(instance.epilogue));
    CAPTURE(instance.b_is_kn);
    const auto can_run = [&](int64_t m, int64_t n, int64_t k) {
      LinearProblem p = problem(instance.b_is_kn);
      p.m = m, p.n = n, p.k = k;
      return instance.can_run(p);
    };
    CHECK(can_run(300, 520, 264));
    CHECK(can_run(1, 8, 8));
    CHECK(can_run(most, 4096, 4096));
    for (int64_t uneven : {1, 4, 257, 260}) {
      CAPTURE(uneven);
      CHECK_FALSE(can_run(300, uneven, 264));
      CHECK_FALSE(can_run(300, 520, uneven));
    }
  }
}

TEST_CASE("workspace: none, the partial sums have their own memory") {
  for (const Instance& instance : instances()) {
    LinearProblem p = problem(instance.b_is_kn);
    CHECK(instance.workspace(p) == 0);
    p.m = p.n = p.k = 1 << 20;
    CHECK(instance.workspace(p) == 0);
  }
}

TEST_CASE("what the epilogues compute of a fragment") {
  using Fragment = cutlass::Array<float, 4>;
  const auto equal = [](const auto& computed, const std::vector<float>& expected) {
    bool same = true;
    for (int i = 0; i < 4; ++i) same = same && static_cast<float>(computed[i]) == expected[i];
    return same;
  };
  const Fragment delta{0.0f, -1.0f, 0.5f, 2.0f}, value{3.0f, 5.0f, 7.0f, -11.0f}, bias{100.0f, 200.0f, 300.0f, 400.0f};
  CHECK(equal(Gained<Fragment>{}(delta, value), {3, 0, 10.5, -33}));
  CHECK(equal(GainedPlusBias<Fragment>{}(delta, value, bias), {103, 200, 310.5, 367}));
  CHECK(equal(First<Fragment>{}(value, delta), {3, 5, 7, -11}));
}

// The recomputed z is only summed; dy @ W is summed and written.
template <class Element, Epilogue kEpilogue, class Value>
constexpr bool writes = std::is_base_of_v<
    ReduceTree<Element, Schedule<Tile::large_128x256>, Value>,
    Tree<Element, Schedule<Tile::large_128x256>, kEpilogue>>;
static_assert(writes<cutlass::half_t, Epilogue::recompute, fusion::Sm90SrcFetch<cutlass::half_t>>);
static_assert(writes<cutlass::half_t, Epilogue::input, fusion::Sm90AccFetch>);

}  // namespace
}  // namespace gain_ops::sm90
