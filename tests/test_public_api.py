"""The public names and signatures that others build on."""

import inspect
import os
import subprocess
import sys

import gain_ops


def test_the_names() -> None:
    assert gain_ops.__all__ == [
        "BackendUnavailable",
        "GainFile",
        "GainFileError",
        "GainLinear",
        "GainOpsError",
        "GainWrapper",
        "__version__",
        "absorb",
        "active_gains",
        "add_gains",
        "apply",
        "check",
        "combine_gains",
        "gain_activation",
        "gain_add",
        "gain_add_layer_norm",
        "gain_add_rms_norm",
        "gain_combine",
        "gain_geglu",
        "gain_glu",
        "gain_grouped_linear",
        "gain_linear",
        "gain_mlp",
        "gain_relu2",
        "gain_rms_norm",
        "gain_rms_norm_add",
        "gain_scale",
        "gain_swiglu",
        "list_gains",
        "load_gains",
        "mix_gains",
        "read_gains",
        "remove",
        "save_gains",
        "saved_bytes",
        "set_gains",
        "use_sets",
        "using_gains",
        "write_gains",
    ]
    assert all(hasattr(gain_ops, name) for name in gain_ops.__all__)


def test_the_signature_of_gain_linear() -> None:
    parameters = inspect.signature(gain_ops.gain_linear).parameters.values()
    assert [(p.name, p.kind.name, p.default) for p in parameters] == [
        ("x", "POSITIONAL_OR_KEYWORD", inspect.Parameter.empty),
        ("weight", "POSITIONAL_OR_KEYWORD", inspect.Parameter.empty),
        ("delta", "POSITIONAL_OR_KEYWORD", inspect.Parameter.empty),
        ("bias", "POSITIONAL_OR_KEYWORD", None),
        ("side", "KEYWORD_ONLY", "output"),
        ("save", "KEYWORD_ONLY", "auto"),
        ("backend", "KEYWORD_ONLY", "auto"),
    ]


def test_every_public_thing_says_what_it_is() -> None:
    for name in gain_ops.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(gain_ops, name)), name


def test_importing_loads_no_triton_no_transformers_and_no_cuda() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import gain_ops\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded & {'triton', 'transformers', 'typer', 'rich', 'peft', 'matplotlib', 'numpy'}))\n"
        "print(torch.cuda.is_initialized(), 'gain_ops.kernels' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False False"]
