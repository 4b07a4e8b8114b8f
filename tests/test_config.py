"""Flag > environment > models.toml > default, and what each kind of value may be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from workstation.cli.plan import choose_device, engine_config, settle
from workstation.cli.serve_settings import REMOVED_FLAGS, SERVE_SETTINGS
from workstation.config import EngineConfig
from workstation.errors import ConfigError, DeviceError
from workstation.settings import Setting, resolve, unknown_variables

TABLE = {setting.name: setting for setting in SERVE_SETTINGS}


def resolved(name: str, flag: Any = None, environment: str | None = None, catalogue: Any = None) -> Any:
    variables = {} if environment is None else {TABLE[name].variable: environment}
    return resolve(SERVE_SETTINGS, {name: flag}, variables, {} if catalogue is None else {name: catalogue})


def test_a_flag_beats_the_environment_which_beats_the_catalogue_which_beats_the_default() -> None:
    seen = [
        resolved("max_model_len", "1000", "2000", 3000), resolved("max_model_len", None, "2000", 3000),
        resolved("max_model_len", None, None, 3000), resolved("max_model_len"),
    ]  # fmt: skip
    assert [settings["max_model_len"] for settings in seen] == [1000, 2000, 3000, None]
    assert [settings.sources["max_model_len"] for settings in seen] == ["flag", "environment", "models.toml", "default"]


def test_a_value_equal_to_the_default_still_counts_as_typed() -> None:
    settings = resolved("max_num_seqs", "256", "8")
    assert (settings["max_num_seqs"], settings.sources["max_num_seqs"]) == (256, "flag")


def test_false_as_a_flag_beats_true_in_the_environment() -> None:
    assert resolved("enable_prefix_caching", False, "true")["enable_prefix_caching"] is False
    assert resolved("enable_prefix_caching", None, "off", True)["enable_prefix_caching"] is False


def test_an_empty_variable_counts_as_unset() -> None:
    assert resolved("max_num_seqs", None, "")["max_num_seqs"] == 256


def test_a_wrong_value_is_refused_even_when_a_stronger_place_overrides_it() -> None:
    with pytest.raises(ConfigError, match="WS_MAX_NUM_SEQS"):
        resolved("max_num_seqs", "8", "many")


@pytest.mark.parametrize(
    ("text", "value"),
    [("32768", 32768), ("32k", 32000), ("32K", 32768), ("25.6k", 25600), ("1M", 1 << 20), ("1m", 10**6), ("auto", None),
     ("-1", None)],
)  # fmt: skip
def test_lengths_take_the_forms_vllm_takes(text: str, value: int | None) -> None:
    assert resolved("max_model_len", text)["max_model_len"] == value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_model_len", "0", "between 1 and"),
        ("max_model_len", "32kk", "32k"),
        ("max_model_len", "1.0001k", "a whole number"),
        ("max_model_len", "1e400", "32k"),
        ("max_model_len", "9" * 400, "between 1 and 2147483647"),
        ("max_num_seqs", "0", "between 1 and 4096"),
        ("max_num_seqs", "-5", "between 1 and 4096"),
        ("max_num_seqs", "1.5", "a whole number"),
        ("max_num_seqs", "9" * 400, "between 1 and 4096"),
        ("gpu_memory_utilization", "nan", "between 0.01 and 1"),
        ("gpu_memory_utilization", "inf", "between 0.01 and 1"),
        ("gpu_memory_utilization", "90", "between 0.01 and 1"),
        ("seed", "-1", "between 0 and 9223372036854775807"),
        ("port", "65536", "between 0 and 65535"),
        ("port", "http", "a whole number"),
        ("dtype", "bfloat61", "did you mean 'bfloat16'"),
        ("quantization", "int3", "one of fp8, int8, int4"),
        ("kv_cache_dtype", "fp9", "did you mean 'fp8'"),
        ("scheduling_policy", "lifo", "one of fcfs, priority"),
        ("override_generation_config", "[1]", "a JSON object"),
        ("override_generation_config", "{", "a JSON object"),
    ],
)
def test_a_value_outside_its_limits_names_flag_value_and_limit(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(name, value)
    assert TABLE[name].flag in caught.value.message and said in caught.value.message
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("quantization_config", "{}", "read from its folder"),
        ("tensor_parallel_size", "2", "one engine on one GPU"),
        ("block_size", "32", "16 tokens"),
        ("trust_remote_code", True, "never runs code"),
        ("enable_lora", True, "adapters"),
        ("speculative_config", '{"method": "ngram"}', "speculative"),
        ("cpu_offload_gb", "4", "all weights live on the device"),
    ],
)
def test_a_flag_whose_feature_has_not_landed_is_refused_with_a_sentence(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match="is not served yet") as caught:
        resolved(name, value)
    assert said in caught.value.message and TABLE[name].flag in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [("tensor_parallel_size", "1"), ("block_size", "16"), ("trust_remote_code", False),
     ("cpu_offload_gb", "0")],
)  # fmt: skip
def test_the_one_value_that_works_is_accepted(name: str, value: Any) -> None:
    assert resolved(name, value).sources[name] == "flag"


def test_every_refusal_says_why() -> None:
    assert not [setting.name for setting in SERVE_SETTINGS if setting.only is not None and not setting.why]
    assert all(len(flag.sentence) > 10 for flag in REMOVED_FLAGS)


def test_names_are_unique_among_settings_and_removed_flags() -> None:
    names = [setting.name for setting in SERVE_SETTINGS] + [flag.name for flag in REMOVED_FLAGS]
    assert len(names) == len(set(names))


def test_lists_repeat_on_the_command_line_and_take_commas_elsewhere() -> None:
    assert resolved("served_model_name", ["a", "b"])["served_model_name"] == ("a", "b")
    assert resolved("served_model_name", None, "a, b")["served_model_name"] == ("a", "b")


def test_an_unknown_key_in_the_catalogue_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        resolve(SERVE_SETTINGS, {}, {}, {"max_model_length": 5})


def test_secrets_are_not_read_from_the_catalogue_nor_shown() -> None:
    with pytest.raises(ConfigError, match="api_key"):
        resolve(SERVE_SETTINGS, {}, {}, {"api_key": "sk-1"})
    with pytest.raises(ConfigError) as caught:
        Setting("key", "int", 0, "A secret.", secret=True).parse("sk-secret", "WS_KEY")
    assert "sk-secret" not in caught.value.message


def test_a_misspelt_variable_is_pointed_out() -> None:
    notes = unknown_variables(SERVE_SETTINGS, {"WS_MAX_MODEL_LENGTH": "5", "WS_PORT": "1", "PATH": "", "WS_KERNELS": "x"})
    assert notes == ["WS_MAX_MODEL_LENGTH is not a setting and was ignored; did you mean WS_MAX_MODEL_LEN?"]


def test_the_engine_gets_the_settings_in_its_own_names() -> None:
    flags = {"max_model_len": "4k", "num_gpu_blocks_override": "100", "dtype": "half", "async_scheduling": True}
    config = engine_config(resolve(SERVE_SETTINGS, flags, {}), "folder", "cpu")
    assert config == EngineConfig(
        model="folder", device="cpu", max_model_len=4000, num_blocks=100, dtype="float16", overlap=True
    )


def test_defaults_of_the_command_line_are_the_engines() -> None:
    assert engine_config(resolve(SERVE_SETTINGS, {}, {}), "f", "auto") == EngineConfig(model="f")


def test_every_field_of_the_engine_follows_a_setting() -> None:
    flags = {
        "dtype": "float32", "load_format": "dummy", "max_model_len": "9", "max_num_seqs": "9", "max_num_batched_tokens": "9",
        "gpu_memory_utilization": "0.5", "kv_cache_memory_bytes": "9", "num_gpu_blocks_override": "9", "seed": "9",
        "enable_prefix_caching": False, "enable_chunked_prefill": False, "scheduling_policy": "priority",
        "max_num_queued_reqs": "9", "async_scheduling": True, "enforce_eager": True, "num_threads": "9",
        "quantization": "fp8", "kv_cache_dtype": "fp8",
    }  # fmt: skip
    changed = engine_config(resolve(SERVE_SETTINGS, flags, {}), "folder", "cpu")
    default = EngineConfig(model="")
    same = {item.name for item in fields(EngineConfig) if getattr(changed, item.name) == getattr(default, item.name)}
    # The first has one value, and the last says who drives the engine; every other field needs a setting.
    assert same == {"block_size", "online"}


def test_two_sizes_for_the_pool_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="give one"):
        settle("demo", {"kv_cache_memory_bytes": "1G", "num_gpu_blocks_override": "10"}, {})


def test_only_the_demo_is_put_on_the_cpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workstation.gpu.has_usable_gpu", lambda: False)
    monkeypatch.setattr("workstation.gpu.sample", lambda *a, **k: None)
    assert choose_device("auto", is_demo=True) == "cpu"
    assert choose_device("cpu", is_demo=False) == "cpu"
    with pytest.raises(DeviceError, match="--device cpu"):
        choose_device("auto", is_demo=False)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "tpu", "CPU "])
def test_a_device_we_do_not_know_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="--device must be"):
        choose_device(device, is_demo=True)
