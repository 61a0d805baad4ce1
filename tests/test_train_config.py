"""A training configuration: what is read, what is refused, and that it comes back the same."""

from pathlib import Path

import pytest

from deflector.envs.errors import InputError
from deflector.training.train_config import TrainConfig, read_config
from deflector.training.train_flags import Train


def test_a_printed_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = read_config(None, ["seed=7", "scenario.cluster=[2P2D, 1P3D]", "warm_start.teacher=kairos"])
    path = tmp_path / "train.yaml"
    path.write_text(config.as_yaml())
    assert read_config(str(path), []) == config != TrainConfig()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("scenario:\n  load: 0.9\non_policy: {epochs: 3}\n")
    config = read_config(str(path), ["on_policy.epochs=2"])
    assert config.scenario.load == (0.9,)
    assert config.scenario.workload == TrainConfig().scenario.workload
    assert config.on_policy.epochs == 2
    assert config.on_policy.batch_size == TrainConfig().on_policy.batch_size


def test_flags_are_short_names_of_keys() -> None:
    flags = Train(cluster="2P2D,4P4D", load="0.5-0.9", slo_tbt=0.05, decisions=1000, set=("lanes=8",), workload="all")
    config = read_config(None, flags.changes())
    assert config.scenario.cluster == ("2P2D", "4P4D")
    assert config.scenario.load == (0.5, 0.9)
    assert (config.scenario.slo_tbt_s, config.decisions, config.lanes) == ((0.05,), 1000, 8)
    assert Train().changes() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("on_policy.epoch=4", "unknown key 'on_policy.epoch': did you mean 'epochs'"),
        ("scenario.laod=0.5", "unknown key 'scenario.laod': did you mean 'load'"),
        ("zzz=1", "unknown key 'zzz': known are algorithm, decisions"),
        ("seed=x", "seed: Input should be a valid integer"),
        ("decisions=0", "decisions: Input should be greater than or equal to 1"),
        ("network.width=1000000", "network.width: Input should be less than or equal to 512"),
        ("algorithm=dqn", "algorithm: Input should be 'maskable_ppo', 'ppo', 'a2c' or 'evolution'"),
        ("on_policy.learning_rate=.nan", "on_policy.learning_rate: Input should be"),
        ("on_policy.learning_rate=.inf", "on_policy.learning_rate: Input should be"),
        ("validation.policies=[kairoz]", "did you mean kairos"),
        ("evolution.policy=oracle_lookahead", "is no analytical rule"),
        ("warm_start.teacher='learned:x'", "is no analytical rule"),
        ("evolution.sigma=1000", "evolution.sigma: Input should be less than or equal to 5"),
        ("on_policy.batch_size=1", "on_policy.batch_size: Input should be greater than or equal to 2"),
        ("on_policy.batch_size=16383", "leaves a batch of one decision over"),
        ("evolution.policy=nothing", "unknown policy 'nothing'"),
        ("seed.inner=1", "--set seed.inner=1: 'seed' has no keys of its own"),
        ("lanes", "--set lanes: write KEY=VALUE"),
        ("=1", "--set =1: write KEY=VALUE"),
        ("lanes=[1", "--set lanes=[1: '[1' is no value"),
    ],
)
def test_bad_keys_and_values_are_refused_in_one_line(change: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_config(None, [change])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_teacher_and_demonstrations_exclude_each_other() -> None:
    with pytest.raises(InputError, match="teacher and demonstrations: give one of the two"):
        read_config(None, ["warm_start.teacher=kairos", "warm_start.demonstrations=x.safetensors"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,\nb: 2", "no YAML in line 2"),
        (b"- 1\n- 2", "it holds no keys"),
        (b"1: 2", "it holds no keys"),
        (b"\xff\xfe\x00", "no YAML"),
        (b"scenario: 3", "scenario: Input should be a valid dictionary"),
        (b"!!python/object/apply:os.system ['true']", "no YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_config(str(path), [])
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_missing_file() -> None:
    with pytest.raises(InputError, match=r"--config nowhere.yaml: cannot read it \(No such file"):
        read_config("nowhere.yaml", [])
