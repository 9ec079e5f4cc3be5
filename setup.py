"""Maps the package folders; everything else is in pyproject.toml.

``kernels/`` at the root has no ``__init__.py`` (it would shadow Hugging Face's ``kernels``, which transformers imports);
the package inside it, ``kernels/gain``, is installed as ``gain_ops.kernels``.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["gain_ops", "gain_ops.*"]),
        "gain_ops.kernels",
    ],
    package_dir={"gain_ops": "gain_ops", "gain_ops.kernels": "kernels/gain"},
)
