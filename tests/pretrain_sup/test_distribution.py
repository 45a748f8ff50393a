"""The distribution is installed as a part of the namespace; its code comes with MultiTalent."""

from importlib import metadata, resources


def test_the_part_is_installed_beside_core_in_one_namespace() -> None:
    requirements = metadata.requires("voxelbridge-pretrain-sup") or []
    core = [line for line in requirements if line.startswith("voxelbridge-core")]
    assert any(">=0.1" in line and "<0.2" in line for line in core)
    assert resources.files("voxelbridge.pretrain_sup").joinpath("py.typed").is_file()
