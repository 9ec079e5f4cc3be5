// The GEMMs of linear.h on sm_90a: CUTLASS collectives (TMA, wgmma, warp-specialised) with epilogue visitor trees.
// Included by the files of sm90/ alone, one instantiation each: a kernel takes most of a minute to compile.
#pragma once

#include <cutlass/cuda_host_adapter.hpp>

#include <stdexcept>
#include <string>

namespace gain_ops::sm90 {

// Of a tensor map that cannot be encoded CUTLASS only prints, and launches a kernel that faults on it: this throws.
inline CUresult checked(const char* function, CUresult result) {
  if (result == CUDA_SUCCESS) return result;
  throw std::runtime_error(
      std::string("gain_ops: the fused GEMM could not be set up: ") + function + " failed with CUresult " +
      std::to_string(static_cast<int>(result)));
}

}  // namespace gain_ops::sm90

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) \
  [](auto... arguments) { return gain_ops::sm90::checked(#function, cutlass::call_##function(arguments...)); }

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "linear.h"

namespace gain_ops::sm90 {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::epilogue::collective;

// (1 + delta) * value: the 1 is added here, so no launch forms the gain.
template <class Fragment>
struct Gained;

template <int N>
struct Gained<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& delta, const Fragment& value) const {
    Fragment result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = (1.0f + delta[i]) * value[i];
    return result;
  }
};

template <>
struct Gained<float> {};  // Sm90Compute asks for the scalar's Arguments; there are none

// (1 + delta) * value + bias
template <class Fragment>
struct GainedPlusBias;

template <int N>
struct GainedPlusBias<cutlass::Array<float, N>> {
  using Fragment = cutlass::Array<float, N>;
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& delta, const Fragment& value, const Fragment& bias) const {
    Fragment result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = (1.0f + delta[i]) * value[i] + bias[i];
    return result;
  }
};

template <>
struct GainedPlusBias<float> {};

// The first of two values: makes a tree evaluate the second for what it stores.
template <class Fragment>
struct First {
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& first, const Fragment&) const { return first; }
};

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
using RowStride = Stride<_0, _1, _0>;

template <Tile>
struct Schedule;

template <>
struct Schedule<Tile::large_128x256> {
  using Shape = cute::Shape<_128, _256, _64>;
  using Cluster = cute::Shape<_2, _1, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <>
struct Schedule<Tile::small_128x128> {
  using Shape = cute::Shape<_128, _128, _64>;
  using Cluster = cute::Shape<_1, _1, _1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

template <class Schedule>
using Delta = fusion::Sm90RowBroadcast<0, typename Schedule::Shape, float, float, RowStride, 4, false>;

// Children first, in the order of the arguments; the node's own arguments last.
template <class Element, class Schedule, Epilogue kEpilogue>
struct Tree;

template <class Element, class Schedule, class Accumulator>
struct LinearTree {
  using Bias = fusion::Sm90RowBroadcast<0, typename Schedule::Shape, Element, float, RowStride>;  // null: -0, which
                                                                                                  // changes no sum
  using Type =
      fusion::Sm90EVT<fusion::Sm90Compute<GainedPlusBias, Element, float, kRound>, Delta<Schedule>, Accumulator, Bias>;
};

template <class Element, class Schedule>
struct Tree<Element, Schedule, Epilogue::linear> {
  using Source = void;
  using Type = typename LinearTree<Element, Schedule, fusion::Sm90AccFetch>::Type;
  static typename Type::Arguments arguments(const LinearProblem& p) {
    return {{p.delta}, {}, {static_cast<const Element*>(p.bias), Element(-0.0f)}, {}};
  }
};

template <class Element, class Schedule>
struct Tree<Element, Schedule, Epilogue::linear_z> {
  using Source = void;
  using Descriptor = collective::detail::EpilogueDescriptor<
      typename Schedule::Shape,
      collective::EpilogueTileAuto,
      void,
      Element,
      typename Schedule::Epilogue>;
  using Aux = collective::detail::AuxStoreDescriptor<Descriptor, cutlass::layout::RowMajor, Element>;
  using Store = fusion::Sm90AuxStore<
      Aux::Stages,
      typename Aux::EpilogueTile,
      Element,
      kRound,
      typename Aux::Stride,
      typename Aux::SmemLayoutAtom,
      typename Aux::CopyOpR2S,
      128 / cutlass::sizeof_bits_v<Element>,
      false>;
  using StoredAccumulator = fusion::Sm90EVT<Store, fusion::Sm90AccFetch>;
  using Type = typename LinearTree<Element, Schedule, StoredAccumulator>::Type;
  static typename Type::Arguments arguments(const LinearProblem& p) {
    return {
        {p.delta},
        {{}, {static_cast<Element*>(p.z), make_stride(p.n, _1{}, int64_t{0})}},
        {static_cast<const Element*>(p.bias), Element(-0.0f)},
        {}};
  }
};

// value * gain is written, acc * c is summed over the rows of the tile: rows past m are zero in both factors.
template <class Element, class Schedule, class Value>
struct ReduceTree {
  using Source = Element;
  using Product = fusion::Sm90EVT<
      fusion::Sm90Compute<cutlass::multiplies, float, float, kRound>,
      fusion::Sm90AccFetch,
      fusion::Sm90SrcFetch<Element>>;
  using Sums = fusion::Sm90EVT<
      fusion::Sm90RowReduction<
          cutlass::plus,
          cutlass::plus,
          cutlass::plus,
          0,
          typename Schedule::Shape,
          float,
          float,
          kRound,
          RowStride,
          4,
          false,   // never null
          false,   // partials stay partials: partials.cu adds them in their order
          false>,  // no mask
      Product>;
  using Written = fusion::Sm90EVT<fusion::Sm90Compute<Gained, Element, float, kRound>, Delta<Schedule>, Value>;
  using Type = fusion::Sm90EVT<fusion::Sm90Compute<First, Element, Element, kRound>, Written, Sums>;
  static typename Type::Arguments arguments(const LinearProblem& p) {
    return {{{p.delta}, {}, {}}, {{{}, {}, {}}, {p.partials, 0.0f, {}}}, {}};
  }
};

template <class Element, class Schedule>
struct Tree<Element, Schedule, Epilogue::recompute> : ReduceTree<Element, Schedule, fusion::Sm90SrcFetch<Element>> {};

template <class Element, class Schedule>
struct Tree<Element, Schedule, Epilogue::input> : ReduceTree<Element, Schedule, fusion::Sm90AccFetch> {};

template <class Element, Epilogue kEpilogue, Tile kTile, bool kBIsKn>
struct Kernel {
  using Plan = Schedule<kTile>;
  using Visitor = Tree<Element, Plan, kEpilogue>;
  using RowMajor = cutlass::layout::RowMajor;
  using LayoutB = std::conditional_t<kBIsKn, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits_v<Element>;

  using CollectiveEpilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90,
      cutlass::arch::OpClassTensorOp,
      typename Plan::Shape,
      typename Plan::Cluster,
      collective::EpilogueTileAuto,
      float,
      float,
      typename Visitor::Source,
      RowMajor,
      kAlignment,
      Element,
      RowMajor,
      kAlignment,
      typename Plan::Epilogue,
      typename Visitor::Type>::CollectiveOp;

  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90,
      cutlass::arch::OpClassTensorOp,
      Element,
      RowMajor,
      kAlignment,
      Element,
      LayoutB,
      kAlignment,
      float,
      typename Plan::Shape,
      typename Plan::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename Plan::Mainloop>::CollectiveOp;

  using GemmKernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
  static_assert(GemmKernel::SharedStorageSize <= 232448, "a block of sm_90 has 227 KiB");

  static typename Gemm::Arguments arguments(const LinearProblem& p) {
    typename GemmKernel::StrideA stride_a;
    get<0>(stride_a) = p.a_stride;
    typename GemmKernel::StrideB stride_b;
    if constexpr (kBIsKn) {
      get<1>(stride_b) = p.b_stride;
    } else {
      get<0>(stride_b) = p.b_stride;
    }
    typename GemmKernel::StrideC stride_c;
    get<0>(stride_c) = p.c_stride;
    typename GemmKernel::StrideD stride_d;
    get<0>(stride_d) = p.n;

    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1},
        {static_cast<const Element*>(p.a), stride_a, static_cast<const Element*>(p.b), stride_b},
        {Visitor::arguments(p), nullptr, stride_c, static_cast<Element*>(p.out), stride_d},
        {p.device, p.multiprocessors}};
    if constexpr (!std::is_void_v<typename Visitor::Source>) {
      arguments.epilogue.ptr_C = static_cast<const Element*>(p.c);
    }
    arguments.scheduler.max_swizzle_size = choose_swizzle(p.m, p.n, p.multiprocessors, kTile);
    return arguments;
  }

  static size_t workspace(const LinearProblem& p) { return Gemm::get_workspace_size(arguments(p)); }

  static bool can_run(const LinearProblem& p) { return Gemm::can_implement(arguments(p)) == cutlass::Status::kSuccess; }

  static void run(const LinearProblem& p, void* workspace, cudaStream_t stream) {
    Gemm gemm;
    check(gemm.initialize(arguments(p), workspace, stream), "set up");
    check(gemm.run(stream), "launched");
  }

 private:
  static void check(cutlass::Status status, const char* step) {
    if (status == cutlass::Status::kSuccess) return;
    const cudaError_t error = cudaGetLastError();
    throw std::runtime_error(
        std::string("gain_ops: the fused GEMM could not be ") + step + ": " + cutlass::cutlassGetStatusString(status) +
        (error == cudaSuccess ? "" : std::string(", ") + cudaGetErrorString(error)));
  }
};

template <class Element, Epilogue kEpilogue, Tile kTile>
LinearKernel linear_kernel(bool b_is_kn) {
  using Kn = Kernel<Element, kEpilogue, kTile, true>;
  using Nk = Kernel<Element, kEpilogue, kTile, false>;
  return b_is_kn ? LinearKernel{Kn::workspace, Kn::can_run, Kn::run}
                 : LinearKernel{Nk::workspace, Nk::can_run, Nk::run};
}

}  // namespace gain_ops::sm90
