"""The benchmarks that run the trainer many times: what they choose, what they report, and how they resume."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from torch.autograd import DeviceType
from transformers import AutoModelForCausalLM

from bench import (
    clean,
    grid,
    job_speed,
    make_model,
    replay,
    scaling,
    speed_chart,
    speed_table,
    step_profile,
    task_runs,
    train_rows,
)
from bench.task_runs import Machine, Work
from tunery.spec import Lora


def outcome(point: dict[str, Any], exact: float, **changes: Any) -> dict[str, Any]:
    return {
        "point": point,
        "exact_tuned": exact,
        "valid_score": exact,
        "valid_loss": 1.0,
        "learning_rate": 1e-3,
    } | changes


def test_a_grid_has_twelve_points_and_the_defaults_own_among_them() -> None:
    for technique, rank in (("lora", 16), ("qlora", 16), ("full", None)):
        points = grid.grid("snips", technique)
        assert len({json.dumps(point) for point in points}) == 12
        assert {"rate": 1.0, "rank": rank, "epochs": 3}.items() <= points[grid_index(points, rank)].items()


def grid_index(points: list[dict[str, Any]], rank: int | None) -> int:
    return next(i for i, p in enumerate(points) if (p["rate"], p["rank"], p["epochs"]) == (1.0, rank, 3))


def test_the_best_point_has_the_most_right_then_the_lowest_loss_and_is_of_its_own_task() -> None:
    first, second, third, *_ = grid.grid("snips", "lora")
    other, *_ = grid.grid("banking", "lora")
    runs = [outcome(first, 0.8), outcome(second, 0.9), outcome(third, 0.9, valid_loss=0.5), outcome(other, 1.0)]
    assert grid.best(runs, "snips", "lora") == third
    assert grid.best([*runs, {"point": grid.grid("snips", "lora")[3], "failed": "x"}], "snips", "lora") is None
    assert grid.best(runs, "snips", "full") is None


def test_the_difference_is_paired_over_seeds_and_tasks() -> None:
    [point, *_] = grid.grid("snips", "lora")
    pairs = {"snips": ((0.80, 0.81), (0.81, 0.84)), "banking": ((0.99, 0.98), (0.97, 0.98))}
    found = {
        (task, "lora"): (point, [outcome(point, a) for a in plain], [outcome(point, b) for b in chosen])
        for task, (plain, chosen) in pairs.items()
    }
    *_, last = grid.lines(found)
    # Differences -1, -3, +2 and 0 points: mean -0.5, deviation 2.0817, t of three degrees 3.182.
    assert last == "lora: default minus best -0.50 (-3.81 .. +2.81), 4 pairs"


def test_the_quantiles_are_those_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = [round(float(stats.t.ppf(0.975, freedom)), 3) for freedom in range(1, 31)]
    assert list(task_runs._QUANTILES) == wanted


@pytest.mark.slow
def test_a_second_invocation_runs_what_failed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = tmp_path / "examples"
    examples.mkdir()
    for file in task_runs.EXAMPLES.glob("banking_*.jsonl"):
        (examples / file.name).write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    monkeypatch.setattr(task_runs, "EXAMPLES", examples)
    base, out = tiny_models.llama(tmp_path / "base", max_position_embeddings=1024), tmp_path / "out.json"
    (base / "facts.json").write_text(json.dumps({"hidden_size": 32, "context_length": 1024}))
    broken = {1: "raise SystemExit(3)"}

    def work(point: dict[str, Any]) -> Work:
        return Work(base, "banking", Lora(), point["seed"], epochs=1, before=broken.get(point["seed"], "pass"))

    points, machine = [{"seed": 0}, {"seed": 1}], Machine(at_once=2)
    good, bad = task_runs.go_on(out, points, work, machine)
    assert good["steps"] == 1
    assert bad["failed"] == "no message"
    broken.clear()
    again, mended = task_runs.go_on(out, points, work, machine)
    assert again == good
    assert mended["seed"] == 1
    assert mended["steps"] == 1
    assert [run["point"] for run in json.loads(out.read_text())["runs"]] == points


def test_replay_is_compared_with_none_on_the_same_task_and_seed() -> None:
    def run(task: str, share: float | None, seed: int, score: float, change: float) -> dict[str, Any]:
        general = {"change": change, "forgetting": {"kl": 1.0, "nll_change": 0.5}}
        point = {"task": task, "share": share, "seed": seed}
        measured = {"exact_tuned": score, "primary": "chrf", "metrics": {"chrf": {"tuned": score}}, "general": general}
        return {"point": point, "task": task, **measured}

    runs = [
        run("snips", 0.1, 0, 0.81, -0.01), run("utterances", 0.1, 0, 0.50, -0.02), run("snips", 0.1, 1, 0.80, 0.0),
        run("snips", None, 0, 0.80, -0.03), run("utterances", None, 0, 0.52, -0.02), {"point": {}, "failed": "x"},
    ]  # fmt: skip
    *_, last = replay.lines(runs)
    # Pairs +1 and -2 points: mean -0.5, deviation 2.1213, t of one degree 12.706.
    assert last.startswith("10% minus none, 2 pairs: task -0.50 (-19.56 .. +18.56); general change +1.00 (")


def test_free_text_is_snips_the_other_way_round() -> None:
    [first, *others] = map(json.loads, task_runs.rows_of("utterances", "train"))
    [snips, *_] = map(json.loads, task_runs.rows_of("snips", "train"))
    assert len(others) == 1214
    assert first["messages"][1] == {"role": "assistant", "content": snips["messages"][1]["content"]}
    assert first["messages"][0]["content"].endswith(snips["messages"][2]["content"])


def test_cleaning_is_compared_with_the_noise_of_the_same_seed(tmp_path: Path) -> None:
    scores = {"noisy": (0.90, 0.80), "clean": (0.93, 0.81), "original": (0.99, 0.99)}
    runs = [
        outcome(point, scores[point["rows"]][point["seed"]], steps=7)
        for point in clean.points(["banking"], 2)
        if point["rows"] in scores and point["level"] != "labels"
    ]
    said = list(clean.lines([*runs, {"point": {}, "failed": "x"}]))
    assert "| banking | faults | noisy | 2 | 7 | 85.0 % (90.0, 80.0) |" in said
    # Pairs +3 and +1 points: mean 2, deviation 1.4142, t of one degree 12.706. The examples' own rows have no pair.
    assert said[-1] == "banking, faults: clean minus noisy +2.00 (-10.71 .. +14.71), 2 pairs"

    folder = tmp_path / "banking-faults-1/noisy"
    folder.mkdir(parents=True)
    (folder / "banking_train.jsonl.gz").write_bytes(gzip.compress(b'{"messages": []}\n'))
    noisy = next(
        p for p in clean.points(["banking"], 2) if (p["level"], p["rows"], p["seed"]) == ("faults", "noisy", 1)
    )
    assert clean.work(tmp_path, tmp_path, noisy).rows == folder
    assert task_runs.rows_of("banking", "train", folder) == ['{"messages": []}\n']
    assert len(task_runs.rows_of("banking", "test", folder)) == 479
    with pytest.raises(SystemExit, match="--prepare"):
        clean.work(tmp_path, tmp_path, {**noisy, "seed": 0})


def test_speed_is_of_the_steps_after_the_warm_up_even_if_the_run_was_cut_off() -> None:
    steps = [
        {"type": "step", "step": n, "tokens": 100 * n, "seconds": 9.0 if n < 3 else 0.5}
        | {"train_loss": 3.0 - n, "grad_norm": 1.0}
        for n in range(1, 6)
    ]
    end = {"type": "finished", "peak_memory_bytes": 2**31}
    log = ["memory plan: P", "peak memory: 2.00 GiB allocated, 2.25 GiB reserved"]

    whole = job_speed.figures([*steps, end], {"first_step": 9.0, "whole": 30.0}, log, 2)
    cut_off = job_speed.figures(steps[:4], {"first_step": 9.0, "whole": 30.0}, log[:1], 2)

    assert (whole["tok_s"], whole["peak_gib"], whole["reserved_gib"], whole["plan"]) == (200, 2.0, 2.25, ["P"])
    assert whole["seconds"]["around_the_steps"] == 10.5
    assert whole["slowest_steps"] == [3, 4, 5]
    assert (cut_off["tok_s"], cut_off["peak_gib"], cut_off["seconds"]["cut_off"]) == (200, None, True)
    assert "failed" in job_speed.figures(steps[:3], {"whole": 1.0}, log, 2)


def test_table_of_speeds_compares_medians_with_the_fastest_peer() -> None:
    found = {
        "tunery": [{"tok_s": 100}, {"tok_s": 130, "losses": [9.0, 8.0, 7.0]}, {"tok_s": 140}, {"failed": []}],
        "unsloth": [{"tok_s": 80, "losses": [9.5, 7.5]}, {"tok_s": 90, "losses": [7.5, 6.5]}],
        "trl-liger": [{"tok_s": 65}, {"failed": "cut off"}],
    }
    assert speed_table.ratio(found) == 1.444
    assert speed_table.ratio({"tunery": [{"tok_s": 1}], "unsloth": [{"failed": 1}]}) is None
    answers = {"generation": [{"tok_s": 30, "transformers": {"tok_s": 20}}]}
    assert speed_table.ratio(answers) == 1.5
    _, _, ours, peer, *_, last = speed_table.lines({"qlora 8b": found, "generation 8b": answers})
    assert ours.startswith("| qlora 8b | tunery | 100/130/140 | 130 | 1.444 |")
    assert "| 9.0, 7.0 |" in ours
    assert peer.startswith("| qlora 8b | unsloth | 80/90 | 90 |")
    assert "| 9.5, 7.5 |" in peer, "later runs train the same model further"
    assert last.startswith("| generation 8b | generation | 30 | 30 | 1.5 |")


def test_each_run_of_a_job_has_its_process_and_rows_of_eight_bits_share_the_peers() -> None:
    bench = speed_table.Bench(Path("models"), over=0, steps=50, skip=10, runs=2, logs=Path("logs"))
    wanted = speed_table._measurements(["qlora 8b", "qlora 8b fp8"], bench)
    again = [(["qlora 8b"], "tunery"), (["qlora 8b fp8"], "tunery")]
    assert wanted == [again[0], (["qlora 8b", "qlora 8b fp8"], "unsloth"), again[1], *again]


@pytest.mark.parametrize(
    ("runs", "then", "failed"), [(2, "", []), (3, "time.sleep(60)", ["cut off"]), (3, "raise MemoryError", [1])]
)
def test_a_peer_keeps_the_runs_that_it_ended_and_says_why_it_has_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int, then: str, failed: list[Any]
) -> None:
    (tmp_path / "two_runs.py").write_text(
        "import time\nassert input() == ''\nfor speed in (5, 6):\n"
        f"    print('RESULT {{\"tok_s\": %d}}' % speed, flush=True)\n{then}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = speed_table.Bench(tmp_path, time.monotonic() + 4, steps=50, skip=10, runs=runs, logs=tmp_path)
    bench.checkpoint("small")
    peer = speed_table.Peer(["two_runs"], tmp_path / "log.txt", runs)
    found = peer.run(bench, speed_table.Row("small", "lora"))
    assert [run["tok_s"] for run in found if "tok_s" in run] == [5, 6]
    assert [run["failed"] for run in found if "failed" in run] == failed
    assert found[0]["seconds"]["runs"] == runs
    assert peer.process.poll() is not None


def test_the_chart_of_the_docs_is_that_of_the_recorded_speeds() -> None:
    assert speed_chart.draw(json.loads(speed_chart.RESULT.read_text())) == speed_chart.CHART.read_text()


def test_a_chart_leaves_out_a_stack_that_failed() -> None:
    failed, peer = [{"failed": "cut off"}], [{"tok_s": 5}]
    rows = {
        "qlora 8b": {"runs": {"tunery": [{"tok_s": 9}], "unsloth": failed, "trl-liger": peer}},
        "lora 8b": {"runs": {"tunery": failed, "unsloth": peer}},
        "lora 1b": {"runs": {"tunery": peer, "unsloth": [{"tok_s": 10}]}},
    }
    drawn = speed_chart.draw({"gpu": "a GPU", "date": "2026-11-29T00:00:00", "rows": rows})
    assert "TRL with Liger 5<" in drawn
    assert "1.80x" in drawn
    assert "0.50x" in drawn
    assert "LoRA 8B" not in drawn.replace("QLoRA 8B", "")


def test_kernels_of_a_profile_are_summed_by_name_without_named_spans() -> None:
    def event(name: str, micros: float, device: DeviceType = DeviceType.CUDA, *, is_span: bool = False) -> Any:
        return SimpleNamespace(name=name, device_time=micros, device_type=device, is_user_annotation=is_span)

    events = [
        event("norm", 100),
        event("product", 3000),
        event("product", 1000),
        event("AdamW.step", 9000, is_span=True),
    ]
    found = step_profile.kernels([*events, event("aten::mm", 50, DeviceType.CPU)], 2)
    assert found == [{"name": "product", "calls": 1.0, "ms": 2.0}, {"name": "norm", "calls": 0.5, "ms": 0.05}]


def test_two_gpus_are_compared_with_the_mean_of_each_alone() -> None:
    def run(speed: int) -> dict[str, Any]:
        return {"tok_s": speed, "all_steps_tok_s": speed - 10, "seconds": {}}

    found = scaling.compare([run(100), run(110)], run(210))
    assert found["scaling"] == {"all_steps": 2.105, "steady": 2.0}
    assert "[100, 110, 210] tokens/s" in scaling.shown("lora 1b", found)
    whole = scaling.median(
        [found, {"ones": [], "two": {"failed": "killed"}}, scaling.compare([run(100)] * 2, run(190))]
    )
    assert whole["scaling"] == {"all_steps": pytest.approx(2.0525), "steady": pytest.approx(1.95)}
    assert len(whole["runs"]) == 3
    failed = scaling.compare([run(100), {"failed": "does_not_fit"}], run(210))
    assert scaling.shown("lora 1b", failed) == "lora 1b: failed ['does_not_fit']"


@pytest.mark.parametrize("size", [640, make_model.TOKENS])
def test_rows_of_the_speed_measurements_have_the_wanted_tokens(size: int) -> None:
    tokenizer = make_model._tokenizer(size)
    assert len(tokenizer) <= size
    wanted = [31, 190, 2048]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in train_rows.chats(wanted)]
    assert [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] == wanted


def test_a_mixture_of_the_speed_measurements_is_a_whole_checkpoint(tmp_path: Path) -> None:
    make_model.make(tmp_path / "base", "small-moe")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values())
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["Qwen3MoeSparseMoeBlock"] * 2
