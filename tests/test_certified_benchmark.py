"""The benchmark of certified networks: its frame and its sound bounds, without the peers' packages."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from scripts import load
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.config import CERTIFIED_PRESETS, RunConfig, preset_settings
from dynablocks.data import DataSplits, ImageDataset
from dynablocks.errors import BadCheckpoint, BadData, Diverged, InvalidArgument, UnsoundResult
from dynablocks.models import ModelConfig, build
from dynablocks.numerics.bounds import ConvGeometry, dense_matrix
from dynablocks.properties import jacobians
from dynablocks.robustness import PAPER_EPSILONS, AttackConfig, CertificateResult, Curve
from dynablocks.run_directory.beginning import TeacherLabels
from dynablocks.switching import set_progress

FOLDER = Path(__file__).parents[1] / "benchmarks" / "certified"


peers, bounds, run, attack, expansion, compare, radius_lost = (
    load(f"benchmarks/certified/{name}.py")
    for name in ("peers", "bounds", "run", "attack", "expansion", "compare", "radius_lost")
)


def orthogonal(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 1, bias=False)
    nn.init.orthogonal_(conv.weight)
    return conv


def tiny(layer: object, stem: int = 2, size: int = 8) -> nn.Module:
    family = peers.Family("here", layer, orthogonal, 4, (1, 1, 0), stem=stem)
    return family.build((3, size, size), 3, torch.full((3,), 0.5), seed=0)


def loose_convolution(channels: int, size: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.normal_(conv.weight)
    return nn.Sequential(conv, peers.MaxMin())


def steepest(model: nn.Module, points: Tensor) -> float:
    """The largest singular value of the body's Jacobian at the points."""
    norms = []
    for point in points:
        jacobian = torch.autograd.functional.jacobian(lambda x: model.body(x[None])[0], point)
        norms.append(torch.linalg.matrix_norm(jacobian.flatten(1), 2).item())
    return max(norms)


@pytest.mark.parametrize("layer", [loose_convolution, peers.CPLStep, peers._soc])
def test_sound_bound_is_above_every_jacobian(layer: object) -> None:
    model = tiny(layer)
    bound = peers.sound_bound(model)
    measured = steepest(model, torch.randn(6, 3, 8, 8))
    assert measured <= bound * (1 + 1e-6)
    assert bound <= (200 if layer is loose_convolution else 3)


def test_sound_bound_sees_a_norm_that_was_underestimated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(peers.CPLStep).eval()
    assert peers.sound_bound(model) == pytest.approx(1, abs=1e-4)
    step = model.body[2]
    monkeypatch.setattr(step, "norm", lambda: 0.5 * step._bound())
    assert peers.sound_bound(model) > 1.5


def test_weights_of_peers_are_made_in_full_precision() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return (weight @ torch.eye(weight.shape[1])) / 2

    model, dense = tiny(peers.CPLStep), nn.Linear(3, 3)
    model.body, model.head = nn.Sequential(nn.Flatten(), dense), nn.Identity()
    model.mean = torch.zeros(1, 3)
    nn.utils.parametrize.register_parametrization(dense, "weight", Halved())
    found: list[torch.dtype] = []
    dense.register_forward_pre_hook(lambda module, args: found.append(module.weight.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(2, 3))
    assert found == [torch.float32]


def test_kernels_are_made_once_a_pass_also_in_a_deep_copy() -> None:
    def kernels_made(network: nn.Module) -> int:
        made: list[nn.Module] = []
        for module in network.modules():
            if isinstance(module, peers.SkewRescaling):
                module.register_forward_hook(lambda module, args, output: made.append(module))
        network(torch.rand(2, 3, 8, 8))
        return len(made)

    model = tiny(peers._soc)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.body[2][0].parametrizations.kernel.original.mul_(-1)
    assert kernels_made(copied) == kernels_made(model) == 2
    pixels = torch.rand(2, 3, 8, 8)
    assert not torch.equal(copied(pixels), model(pixels))


def test_sound_bound_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="no sound bound is known for Softplus"):
        peers.sound_bound(tiny(lambda channels, size: nn.Softplus()))


def test_the_head_has_rows_of_norm_one() -> None:
    model = tiny(peers.CPLStep)
    norms = model.head.effective_weight().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3), rtol=0, atol=1e-6)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_a_larger_stem_has_fewer_positions_and_the_same_widths() -> None:
    coarse = tiny(peers.CPLStep, stem=4, size=16)
    assert coarse.head.in_features == 16
    assert [step.leading.shape[1:] for step in coarse.body if isinstance(step, peers.CPLStep)] == [(4, 4, 4), (8, 2, 2)]
    assert steepest(coarse, torch.randn(3, 3, 16, 16)) <= peers.sound_bound(coarse) * (1 + 1e-6)


@pytest.mark.parametrize("dense_layer", [None, lambda features: peers.CPLStep(features, 1, kernel_size=1)])
def test_dense_layers_behind_the_stages_count_in_the_sound_bound(dense_layer: object) -> None:
    options = {"stem": 4, "dense": 2, "dense_layer": dense_layer}
    model = peers.Family("here", peers.CPLStep, orthogonal, 4, (1, 1, 0), **options).build(
        (3, 32, 32), 3, torch.full((3,), 0.5), seed=0
    )
    assert model.head.in_features == 64
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert steepest(model, torch.randn(3, 3, 32, 32)) <= peers.sound_bound(model) * (1 + 1e-6)
    last = model.body[-2] if dense_layer else model.body[-2][0]
    before = peers.sound_bound(model)
    with torch.no_grad():
        getattr(last, "kernel" if dense_layer else "weight").mul_(2)
    assert peers.sound_bound(model) == pytest.approx(before if dense_layer else 2 * before, rel=1e-4)


def test_the_expansion_is_measured_of_entries_with_and_without_dense_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    family = peers.Family("here", peers.CPLStep, orthogonal, 4, (1, 1, 0))
    monkeypatch.setitem(expansion.FAMILIES, "cpl", family)
    for dense in ({"dense": 1}, {}):
        sizes = {"width": 4, "depth": (1, 1, 0), "stem": 4} | dense
        model = replace(family, **sizes).build((3, 32, 32), 10, torch.zeros(3), seed=1)
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        save_file(model.state_dict(), tmp_path / "checkpoint" / "model.safetensors")
        run.write_json(tmp_path / "result.json", {"settings": sizes | {"family": "cpl", "depth": [1, 1, 0]}})
        assert 0 < expansion.expansion(expansion.trained(tmp_path), torch.rand(2, 3, 32, 32), 3) < 2
    run.write_json(tmp_path / "result.json", {"settings": {"config": {}}})
    with pytest.raises(InvalidArgument, match="is no peer"):
        expansion.trained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "setting", "sentence"),
    [
        ("ours", "epochs=3", "unknown setting of ours 'epochs'"),
        ("ours", "dense=3", "dense"),
        ("aoc", "rows=1", "rows"),
        ("cpl", "depth=5", "depth is 5; a list of whole numbers"),
        ("cpl", "depth=[2,-1]", "depth is"),
        ("cpl", "width=wide", "width is 'wide'"),
        ("cpl", "stem=0", "stem is 0"),
        ("cpl", "inner=0", "inner is 0; allowed are values in"),
        ("sll", "inner=1.5", r"inner is 1\.5; allowed are values in"),
        ("cpl", "inner=wide", "inner is 'wide'"),
        ("aoc", "inner=0.5", r"inner is 0\.5, but the layers of orthogonium .* as many rows as channels; leave it out"),
        ("ours", "inner=0.5", "unknown setting of ours 'inner'"),
        ("torchlip", "loss=lse-hkr", "unknown loss 'lse-hkr'"),  # run.py alone knows it, as a program
        ("cpl", "batch_size=many", "batch_size is 'many'"),
        ("ours", "widths=64", "widths is 64; whole numbers"),
        ("ours", "lr=-1", "lr is -1"),
    ],
)
def test_a_setting_that_an_entry_lacks_or_cannot_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, entry: str, setting: str, sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "d", "--out", "o", "--entries", entry, "--set", setting])
    with pytest.raises(InvalidArgument, match=sentence):
        run.parse()


def test_set_given_twice_sets_both(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "run.py --data-dir d --out o --entries ours --set optimiser=adamw --set weight_decay=0.05 lr=0.01"
    monkeypatch.setattr(sys, "argv", flags.split())
    assert run.parse().set == {"optimiser": "adamw", "weight_decay": 0.05, "lr": 0.01}


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        ("run", "--data-dir d --out o --minutes 0", "--minutes is 0"),
        ("run", "--data-dir d --out o --search -1", "--search is -1"),
        ("run", "--data-dir d --out o --teacher -1", "--teacher is -1"),
        ("run", "--data-dir d --out o --held-out -1", "--held-out is -1"),
        ("run", "--data-dir d --out o --seed -1", "--seed is -1"),
        ("attack", "RUN --batch-size 0", "--batch-size is 0"),
        ("attack", "RUN --samples 0", "--samples is 0"),
        ("attack", "RUN --epsilon nan", "--epsilon is nan"),
        ("bounds", "--peers p --layers 0", "--layers is 0"),
        ("expansion", "WORK/soc-0 --data-dir d --images 0", "--images is 0"),
    ],
)
def test_numbers_out_of_range_get_one_sentence(
    script: str, flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
    with pytest.raises(InvalidArgument, match=sentence):
        {"run": run, "attack": attack, "bounds": bounds, "expansion": expansion}[script].parse()


def test_an_attack_that_cannot_be_stored_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(attack, "measured", lambda directory, options: {"clean": 0.5})
    monkeypatch.setattr(sys, "argv", ["attack.py", str(tmp_path / "file")])
    assert attack.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write ")
    assert said.count("\n") == 1


def test_a_missing_autoattack_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("load_config", "certify_run", "attack_run"):
        monkeypatch.setattr(attack, name, lambda *given: pytest.fail("computed"))
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setattr(sys, "argv", ["attack.py", str(tmp_path)])
    assert attack.main() == 1
    cure = "install it with: pip install -c constraints.txt -e '.[bench]'"
    assert capsys.readouterr().err == f"error: pyautoattack is not installed; {cure}\n"


@pytest.mark.parametrize("state", [[], {"done": 5}, {"distances": [None]}, {"distances": ["x"] * 3}, {}])
def test_a_cut_state_of_autoattack_is_begun_anew(state: object) -> None:
    belongs = {"weights": "w", "fingerprint": "f"}
    whole = belongs | {"done": ["apgd-ce"], "distances": [None, 0.5, 0.0]}
    assert attack.goes_on(whole, belongs, 3)
    changed = whole | state if isinstance(state, dict) else state
    assert attack.goes_on(changed, belongs, 3) == (state == {})
    assert not attack.goes_on(whole, belongs | {"weights": "others"}, 3)


def test_an_entry_whose_files_are_not_whole_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    family = peers.Family("here", peers.CPLStep, orthogonal, 4, (1, 1, 0))
    monkeypatch.setitem(expansion.FAMILIES, "cpl", family)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.parent.mkdir()

    def refused(settings: object) -> None:
        run.write_json(tmp_path / "result.json", settings)
        with pytest.raises(BadCheckpoint, match=r"holds no whole network of run\.py") as caught:
            expansion.trained(tmp_path)
        assert "\n" not in str(caught.value)

    whole = {"settings": {"family": "cpl", "width": 4, "depth": [1, 1, 0], "stem": 4}}
    refused(whole)
    weights.write_bytes(b"cut")
    refused(whole)
    save_file({"other": torch.zeros(1)}, weights)
    refused(whole)
    for change in ({"width": "wide"}, {"depth": 5}, {"family": "other"}):
        refused({"settings": whole["settings"] | change})
    refused({"settings": {"family": "cpl"}})
    refused({})


def test_our_bound_is_never_below_the_truth_over_the_zoo() -> None:
    layers = bounds.zoo(24, seed=3)
    ratios = [bounds.ours(layer, size) / bounds.truth(layer, size) for layer, size in layers]
    assert min(ratios) >= 1
    assert max(ratios) < 1.01


def test_shares_count_only_radii_above() -> None:
    radii = torch.tensor([0.0, 36 / 255, 0.3, 1.1], dtype=torch.float64)
    assert run.shares(radii) == {"36": 50.0, "72": 50.0, "108": 25.0, "255": 25.0}


OUR_MODEL = {
    name.removeprefix("model."): value
    for name, value in run.as_named(
        run.our_config(
            run.argparse.Namespace(preset="certified/cpu-1h", minutes=60.0, seed=0, held_out=0, set={}, data_dir=None)
        )
    ).items()
}


def entry(name: str, share: float, seed: int = 0) -> dict:
    certified = dict.fromkeys(("36", "72", "108", "255"), share)
    facts = {"name": name, "seed": seed, "clean": 60.0, "certified": certified, "own": certified, "bound": 1.0}
    facts |= {
        "images_per_second": 9,
        "epochs": 1.0,
        "parameters": 1000,
        "precision": "32",
        "device": "cpu",
        "search": {},
    }
    origin = {
        "images": 10,
        "measured": "test",
        "data": "d",
        "commit": "c",
        "hardware": "h",
        "started": "2026-11-26 17:42",
        "minutes": 60.0,
        "preset": "certified/cpu-1h",
        "crop_padding": 4,
        "crop_fill": "reflect",
        "source": "dynablocks" if name.startswith("ours") else "orthogonium",
    }
    if name.startswith("ours"):
        origin["settings"] = {"config": OUR_MODEL}
    return facts | origin


def test_table_puts_the_most_certified_first_and_joins_seeds() -> None:
    entries = [entry("worse-0", 40.0), entry("better-0-depth=[1]", 50.0), entry("better-1-depth=[1]", 53.0, 1)]
    worse, better = run.rows(entries)[1], run.rows(entries)[0]
    assert better[:4] == ["better-depth=[1]", "2", "60.00 ± 0.00", "51.50 ± 2.12"]
    assert worse[:4] == ["worse", "1", "60.00", "40.00"]
    lines = run.table(entries).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["better-depth=[1]", "worse"]


def test_the_page_says_how_its_rows_were_made() -> None:
    page = run.as_page([entry("ours-0", 50.0), entry("ours-1", 53.0, 1)], 60.0)
    assert {len(row) for row in page["rows"]} == {len(page["columns"])}
    assert (page["seed"], page["data"], page["date"]) == ("0, 1", "d", "2026-11-26")
    assert "10 test images" in page["caption"]


def test_a_page_of_results_with_and_without_a_commit_says_so() -> None:
    page = run.as_page([entry("ours-0", 50.0), entry("ours-1", 53.0, 1) | {"commit": None}], 60.0)
    assert page["commit"] == "c, unknown"


def test_what_was_written_on_a_page_by_hand_stays() -> None:
    earlier = {"title": "On two cores", "note": "Seed 1 was alone.", "readme": False, "caption": "old", "seed": 7}
    page = run.as_page([entry("ours-0", 50.0)], 60.0, earlier=earlier)
    assert (page["title"], page["note"], page["readme"]) == ("On two cores", "Seed 1 was alone.", False)
    assert page["caption"] != "old"
    assert page["seed"] == "0"
    assert "note" not in run.as_page([entry("ours-0", 50.0)], 60.0)


def test_the_caption_tells_whose_settings_were_searched_whatever_this_sitting_asks() -> None:
    trials = [{"change": {"lr": rate}, "minutes": 1.0} for rate in (0.1, 0.2, 0.3, 0.4)]
    search = {"chosen": {}, "minutes": 1.0, "tried": [*trials, trials[2] | {"minutes": 4.0}]}
    page = run.as_page([entry("ours-0", 50.0), entry("aoc-0", 40.0) | {"search": search}], 60.0)
    assert "aoc: the best of 4 settings" in page["caption"]
    assert "1-minute and 4-minute trainings on 5000 held-out training images (the longer ones of" in page["caption"]
    assert page["command"].endswith("--search 1")
    # Results of searches in one round do not say the minutes of each trial.
    earlier = {"minutes": 1.0, "tried": [{"change": {"lr": rate}} for rate in (0.1, 0.2)]}
    caption = run.as_page([entry("aoc-0", 40.0) | {"search": earlier}], 60.0)["caption"]
    assert caption.endswith("chosen by 1-minute trainings on 5000 held-out training images.")


def test_the_caption_tells_searches_with_longer_trials_from_those_without() -> None:
    trials = [{"change": {"lr": rate}} for rate in (0.1, 0.2)]
    one_round = entry("aoc-0", 41.0) | {"search": {"minutes": 1.0, "tried": trials}}
    short, long = [trial | {"minutes": 1.0} for trial in trials], trials[0] | {"minutes": 4.0}
    rounds = entry("soc-0", 40.0) | {"search": {"minutes": 1.0, "tried": [*short, long]}}
    alone = [run.how_searched([result]) for result in (one_round, rounds)]
    assert "aoc: the best of 2" in alone[0]
    assert "4-minute" not in alone[0]
    assert "soc: the best of 2" in alone[1]
    assert "1-minute and 4-minute" in alone[1]
    assert run.as_page([rounds, one_round], 60.0)["caption"].endswith(alone[0] + alone[1])


def test_a_peer_that_was_not_searched_is_not_taken_for_one_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = entry("aoc-0", 40.0)
    run.write_json(tmp_path / "aoc-0" / "result.json", facts)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path), "--search", "1"])
    with pytest.raises(InvalidArgument, match=r"aoc-0 with search 0\.0, asked for is 1\.0"):
        run.result_of("aoc", run.parse())


def test_a_page_made_with_another_augmentation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)])
    wanted = run.crop(run.parse())
    for other in ({"crop_padding": 7}, {"crop_fill": "other"}):
        run.write_json(tmp_path / "ours-0" / "result.json", entry("ours-0", 50.0) | wanted | other)
        ((name, value),) = other.items()
        with pytest.raises(InvalidArgument, match=f"with {name} {value!r}, asked for is {wanted[name]!r}"):
            run.result_of("ours", run.parse())


def test_a_network_of_an_earlier_preset_is_not_taken_for_that_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)])
    for changed, said in (
        ({"layers": [4, 4, 3]}, r"model\.layers \[4, 4, 3\]"),
        ({"dense_rows": None}, "dense_rows None"),
    ):
        facts = entry("ours-0", 50.0) | {"settings": {"config": OUR_MODEL | changed}}
        run.write_json(tmp_path / "ours-0" / "result.json", facts)
        with pytest.raises(InvalidArgument, match=said):
            run.result_of("ours", run.parse())
    facts = {name: value for name, value in entry("ours-0", 50.0).items() if name != "crop_padding"}
    run.write_json(tmp_path / "ours-0" / "result.json", facts)
    with pytest.raises(InvalidArgument, match="crop_padding 'not recorded'"):
        run.result_of("ours", run.parse())


def test_a_peer_searched_in_other_settings_is_not_taken_for_one_of_this_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = run.changes_of("cpl")
    first = [{"change": change, "minutes": 1.0, "certified": 30.0 - n} for n, change in enumerate(offered)]
    finalists = [{"change": change, "minutes": 4.0} for change in [*offered[:3], run.OUR_SIZES]]
    rates = [{"change": run.ADAM | {"lr": rate}, "minutes": 4.0} for rate in (0.001, 0.009)]
    tried = [*first, *finalists, *rates]
    in_one_round = [{"change": change} for change in offered] + rates
    of_other_changes = [trial for trial in tried if trial["change"] != run.OUR_SIZES]
    where = ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)]
    for changes, arguments, said in (
        (tried[:4], ["--search", "1"], "changes searched"),
        (of_other_changes, ["--search", "1"], "changes searched .*one table compares equals"),
        (in_one_round, ["--search", "1"], "with finalists"),
        ([*first[:6], first[6] | {"certified": 40.0}, *finalists, *rates], ["--search", "1"], "with finalists"),
        (tried[:-1], ["--search", "1"], "with minutes of trials"),
        ([*tried, tried[-1]], ["--search", "1"], "with minutes of trials"),
        ([trial | {"minutes": 1.0} for trial in tried], ["--search", "1"], "with minutes of trials"),
        (tried, [], r"search 1\.0, asked for is 0\.0"),
        (tried, ["--search", "1"], None),
    ):
        facts = entry("cpl-0", 40.0) | {"search": {"chosen": {}, "minutes": 1.0, "tried": changes}}
        facts |= {"settings": {"family": "cpl"}, "source": peers.FAMILIES["cpl"].source}
        run.write_json(tmp_path / "cpl-0" / "result.json", facts)
        monkeypatch.setattr(sys, "argv", [*where, *arguments])
        if said is None:
            assert run.result_of("cpl", run.parse())["clean"] == 60.0
        else:
            with pytest.raises(InvalidArgument, match=said):
                run.result_of("cpl", run.parse())


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("cpl, two minutes of search-0", "CPL, written here at edffc18", None),
        ("cpl, two minutes of search-0", "CPL, written here", "with source 'CPL, written here'"),
        ("cpl-0", "CPL, written here at edffc18", "with source 'CPL, written here at edffc18'"),
    ],
)
def test_a_peer_of_an_earlier_commit_is_kept_under_a_name_and_a_source_that_say_so(
    name: str, source: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path), "--search", "1"])
    search = {"minutes": 2.0, "tried": [{"change": {}}]}
    facts = entry(name, 40.0) | {"source": source, "settings": {"family": "cpl"}, "search": search}
    if said is None:
        run.require_same(tmp_path, facts, run.parse())
    else:
        with pytest.raises(InvalidArgument, match=said):
            run.require_same(tmp_path, facts, run.parse())


def on_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The networks on the page after a run of two entries of which one is there already."""
    page = tmp_path / "page.json"
    trained = []

    def result_of(name: str, args: run.argparse.Namespace) -> None:
        trained.append(name)
        facts = entry(run.label(name, args), 40.0) | {"minutes": args.minutes, "hardware": run.hardware()}
        run.write_json(args.out / run.label(name, args) / "result.json", facts)

    if not page.exists():
        facts = entry("ours-0", 50.0) | {"minutes": 60.0, "hardware": run.hardware()}
        run.write_json(page, run.as_page([facts], 60.0))
    monkeypatch.setattr(run, "result_of", result_of)
    monkeypatch.setitem(run.FAMILIES, "aoc", peers.Family("here", loose_convolution, orthogonal, 4, (1, 1, 0)))
    where = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "work"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["run.py", *where, "--entries", "ours", "aoc", *arguments])
    run.main()
    assert trained == ["aoc"]
    return [row[0] for row in run.read_json(page)["rows"]]


def test_a_page_keeps_the_entries_of_earlier_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_page(tmp_path, monkeypatch) == ["ours", "aoc"]


@pytest.mark.parametrize("what", ["minutes", "hardware"])
def test_a_page_of_another_machine_or_budget_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "hardware":
        names = iter(["another processor"])
        monkeypatch.setattr(run, "hardware", lambda: next(names, "this processor"))
    with pytest.raises(InvalidArgument, match=f"holds ours-0 with {what}.*name another file"):
        on_a_page(tmp_path, monkeypatch, "--minutes", "60" if what == "hardware" else "15")


@pytest.mark.parametrize("page", [{"rows": [["ours", "1"]]}, [], 5, {"entries": 5}])
def test_a_page_without_entries_is_not_overwritten(
    page: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_json(tmp_path / "page.json", page)
    with pytest.raises(InvalidArgument, match="no entries to add to"):
        on_a_page(tmp_path, monkeypatch)
    assert run.read_json(tmp_path / "page.json") == page


def test_two_sittings_at_once_lose_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, made = tmp_path / "page.json", {"hardware": run.hardware()}

    def result_of(name: str, args: run.argparse.Namespace) -> None:
        run.write_json(args.out / "aoc-0" / "result.json", entry("aoc-0", 40.0) | made)
        meanwhile = [entry("ours-0", 50.0) | made, entry("sll-0", 45.0) | made]
        run.write_json(page, run.as_page(meanwhile, 60.0))

    run.write_json(page, run.as_page([entry("ours-0", 50.0) | made], 60.0))
    monkeypatch.setattr(run, "result_of", result_of)
    monkeypatch.setitem(run.FAMILIES, "aoc", peers.Family("here", loose_convolution, orthogonal, 4, (1, 1, 0)))
    where = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "work"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["run.py", *where, "--entries", "ours", "aoc"])
    run.main()
    assert [row[0] for row in run.read_json(page)["rows"]] == ["ours", "sll", "aoc"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"source": None}, "source"),
        ({"certified": {"36": 50.0}}, "certified"),
        ({"clean": float("nan")}, "clean"),
        ({"precision": "64"}, "precision"),
        ({"search": 5}, "search"),
        ({"search": {"tried": [5]}}, "search"),
        ({"search": {"tried": [{"certified": "most"}]}}, "search"),
        ({"settings": 5}, "settings"),
    ],
)
def test_a_cut_or_edited_result_is_one_sentence(
    change: dict, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ours-0" / "result.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)])
    file.parent.mkdir()
    for text in (json.dumps(entry("ours-0", 50.0) | change), "[]"):
        file.write_text(text)
        with pytest.raises(InvalidArgument, match=f"holds a result without {part if text != '[]' else 'name'}"):
            run.result_of("ours", run.parse())


@pytest.mark.parametrize("other", [{"minutes": 15.0}, {"measured": "held-out"}, {"preset": "certified/cpu-15min"}])
def test_a_result_made_otherwise_is_not_taken_for_this_one(
    other: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = entry("ours-0", 50.0)
    run.write_json(tmp_path / "ours-0" / "result.json", facts)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)])
    args = run.parse()
    assert run.result_of("ours", args)["clean"] == 60.0
    run.write_json(tmp_path / "ours-0" / "result.json", facts | other)
    with pytest.raises(InvalidArgument, match=f"ours-0 with {next(iter(other))}.*name another file or folder"):
        run.result_of("ours", args)


def test_results_on_another_number_of_held_out_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path), "--held-out"]
    facts = entry("ours-0", 50.0) | {"measured": "held-out", "images": 1000}
    run.write_json(tmp_path / "ours-0" / "result.json", facts)
    monkeypatch.setattr(sys, "argv", [*where, "1000"])
    assert run.result_of("ours", run.parse())["images"] == 1000
    monkeypatch.setattr(sys, "argv", [*where, "5000"])
    with pytest.raises(InvalidArgument, match="ours-0 with images 1000, asked for is 5000"):
        run.result_of("ours", run.parse())


def test_the_command_of_a_page_says_what_its_results_were_made_with() -> None:
    assert run.as_page([entry("ours-0", 50.0)], 60.0)["command"].endswith(" --minutes 60 --preset certified/cpu-1h")
    held = {"measured": "held-out", "images": 500}
    page = run.as_page([entry("ours-0", 50.0) | held, entry("ours-1-lr=0.5", 50.0, 1) | held], 3.0)
    said = "--minutes 3 --preset certified/cpu-1h --held-out 500 [--seed N] [--entries NAME --set ...]"
    assert page["command"].endswith(said)


def test_an_entry_that_is_measured_again_keeps_the_origin_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, splits: object, measured: object, args: run.argparse.Namespace, directory: Path) -> dict:
        (directory / "checkpoint").mkdir(exist_ok=True)
        return {key: value for key, value in entry("cpl-0", 40.0).items() if key not in run.ORIGIN}

    splits = SimpleNamespace(train=SimpleNamespace(name="d"), test=[0], fingerprint="f")
    monkeypatch.setattr(run, "load_data", lambda *args: splits)
    monkeypatch.setattr(run, "train_peer", train)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path), "--entries", "cpl"])
    args = run.parse()

    def measured_at(commit: str, moment: str, machine: str) -> dict:
        (tmp_path / "cpl-0" / "result.json").unlink(missing_ok=True)
        monkeypatch.setattr(run, "commit", lambda: commit)
        monkeypatch.setattr(run, "hardware", lambda: machine)
        monkeypatch.setattr(run, "time", SimpleNamespace(strftime=lambda format: moment))
        return run.result_of("cpl", args)

    first = measured_at("52bd512", "2026-11-29 12:03", "h")
    assert [first[name] for name in run.ORIGIN] == ["2026-11-29 12:03", "52bd512", "h"]
    assert "finished_by" not in first
    again = measured_at("edffc18", "2026-11-30 13:07", "another")
    assert again == first | {"finished_by": "edffc18"}
    assert first["fingerprint"] == "f"
    page = run.as_page([again], 60.0)
    assert (page["date"], page["hardware"]) == ("2026-11-29", "h")
    assert page["commit"] == "52bd512 (finished by edffc18)"


def test_results_on_another_copy_of_the_images_get_no_common_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier result does not say on which it was made, and is kept."""
    splits = SimpleNamespace(train=SimpleNamespace(name="d"), test=[0], fingerprint="b" * 64)
    monkeypatch.setattr(run, "load_data", lambda *args: splits)
    monkeypatch.setattr(run, "train_peer", lambda *args: pytest.fail("it was trained"))
    page, ours = tmp_path / "page.json", entry("ours-0", 50.0) | {"hardware": run.hardware()}
    where = ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path / "work"), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*where, "--entries", "cpl"])
    args, file = run.parse(), tmp_path / "work" / "ours-0" / "result.json"
    said = r"ours-0 \(fingerprint a{16}…\) and cpl-0 \(fingerprint b{16}…\) are of the images of two copies"
    known = ours | {"fingerprint": "a" * 64}
    run.write_json(page, run.as_page([known], 60.0))
    with pytest.raises(InvalidArgument, match=said):
        run.result_of("cpl", args)
    page.unlink()
    run.write_json(file, known)
    with pytest.raises(InvalidArgument, match=said):
        run.result_of("cpl", args)
    other = entry("ours-1", 50.0, 1) | {"hardware": run.hardware(), "fingerprint": "b" * 64}
    run.write_json(tmp_path / "work" / "ours-1" / "result.json", other)
    for given in (args, run.argparse.Namespace(**vars(args) | {"page": None})):
        with pytest.raises(InvalidArgument, match="are of the images of two copies"):
            run.write_page(given)
    run.write_json(file, ours)
    assert [result["name"] for result in run.write_page(args)] == ["ours-0", "ours-1"]
    run.write_json(file, ours | {"fingerprint": 5})
    with pytest.raises(InvalidArgument, match="a result without fingerprint, or with another kind of it"):
        run.write_page(args)


def test_an_origin_belongs_to_a_training_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit_of(now: str) -> str | None:
        monkeypatch.setattr(run, "commit", lambda: now)
        return run.origin_of(tmp_path)["commit"]

    # The first came to nothing: there is no checkpoint.
    assert [commit_of("a"), commit_of("b")] == ["a", "b"]
    (tmp_path / "checkpoint").mkdir()
    assert commit_of("c") == "b"
    for cut in ([], {"commit": "b"}, {"started": "then", "commit": 5, "hardware": "h"}):
        run.write_json(tmp_path / run.ORIGIN_FILE, cut)
        with pytest.raises(InvalidArgument, match="does not say when, by which commit and on which machine"):
            run.origin_of(tmp_path)
    (tmp_path / run.ORIGIN_FILE).unlink()
    assert commit_of("d") is None


def test_our_settings_take_the_budget_the_seed_and_the_changes() -> None:
    args = run.argparse.Namespace(
        preset="certified/cpu-1h", minutes=7.0, seed=3, held_out=100, set={"widths": [8, 16], "lr": 0.5}, data_dir=None
    )
    config = run.our_config(args)
    assert (config.training.max_minutes, config.training.epochs, config.training.seed) == (7.0, None, 3)
    assert (config.model.widths, config.training.lr, config.data.validation) == ((8, 16), 0.5, 100)


@pytest.mark.parametrize("preset", CERTIFIED_PRESETS)
def test_certified_presets_are_bounded_by_time(preset: str) -> None:
    training = preset_settings(preset, "certified", "cifar10")["training"]
    assert training["epochs"] is None
    assert preset.endswith({5: "5min", 15: "15min", 25: "25min", 60: "1h"}[int(training["max_minutes"])])


@pytest.mark.parametrize("preset", [name for name in CERTIFIED_PRESETS if "/gpu-" in name])
def test_the_gpu_presets_have_the_crops_of_the_hour_and_are_seldom_validated(preset: str) -> None:
    names = ("certified/cpu-1h", preset)
    hour, training = (preset_settings(name, "certified", "cifar10")["training"] for name in names)
    assert training["validate_every"] == 20
    for name in ("crop_padding", "crop_fill"):
        assert training[name] == hour[name]


@pytest.mark.skipif(shutil.which("timeout") is None, reason="the script ends a piece with timeout")
def test_the_script_for_a_gpu_takes_five_minutes_and_copies_what_is_finished(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    lines = [
        "#!/bin/sh",
        '[ "$1" != -c ] || exit 0',
        'echo "$@" > "$HERE/said"',
        'cd "$HERE" && mkdir -p work/ours-0/checkpoint work/ours-0/checkpoint.previous work/begun',
        "for name in result.json radii.safetensors checkpoint/state checkpoint.previous/state; do",
        "  echo 1 > work/ours-0/$name",
        "done",
    ]
    stub.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "OUT": str(out), "HERE": str(tmp_path)}
    subprocess.run(["bash", FOLDER / "on_gpu.sh", "data", tmp_path / "work"], env=environment, check=True)
    assert "--preset certified/gpu-5min --minutes 5" in (tmp_path / "said").read_text(encoding="utf-8")
    copied = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert copied == ["ours-0/radii.safetensors", "ours-0/result.json", "ours-0/run.tar.aa"]
    with tarfile.open(out / "ours-0" / "run.tar.aa") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert names == {".", "radii.safetensors", "result.json", "checkpoint", "checkpoint/state"}


@pytest.mark.parametrize(("model", "data"), [("resnet", "cifar10"), ("certified", "digits")])
def test_certified_presets_refuse_other_models_and_small_images(model: str, data: str) -> None:
    with pytest.raises(InvalidArgument, match="take --preset cpu"):
        preset_settings("certified/cpu-1h", model, data)


def test_the_search_tries_the_best_for_longer_and_tells_all_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, longer = [31.0, 40.0, 34.0, 30.0, 29.0, 28.0], [33.0, 36.0, 30.0, 32.0, 37.0, 20.0]
    shares = iter(first + longer)
    seen = []

    def short(name: str, args: run.argparse.Namespace) -> dict:
        assert args.teacher == 0  # trials are not taught
        seen.append((args.out, args.minutes, args.held_out, args.search, args.set))
        return {"clean": 50.0, "certified": {"36": next(shares)}}

    monkeypatch.setattr(run, "result_of", short)
    asked = {"set": {"depth": [1]}, "out": tmp_path, "minutes": 60.0, "search": 2.0, "held_out": 0, "seed": 0}
    args = run.argparse.Namespace(**asked, teacher=9.0)
    found = run.best_change("aol", args)
    # The best three and the largest; then the best of these with a third and with three times its rate.
    again = [run.SEARCH[place] for place in (1, 2, 0, 5)]
    again += [run.SEARCH[2] | {"lr": rate} for rate in (0.001, 0.009)]
    changes = [*run.SEARCH, *again]
    assert [trial["change"] for trial in found["tried"]] == changes
    assert [trial["certified"] for trial in found["tried"]] == first + longer
    assert [trial["minutes"] for trial in found["tried"]] == [2.0] * 6 + [8.0] * 6
    assert found["chosen"] == run.SEARCH[2] | {"lr": 0.001}
    folders = [(tmp_path / "search-2", 2.0)] * 6 + [(tmp_path / "search-8", 8.0)] * 6
    assert seen == [
        (*folder, run.HELD_OUT, 0.0, change | {"depth": [1]}) for folder, change in zip(folders, changes, strict=True)
    ]


def test_a_trial_that_diverges_certifies_nothing_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(name: str, args: run.argparse.Namespace) -> dict:
        if "dense" in args.set:
            raise Diverged("the loss is not finite after step 10")
        return {"clean": 50.0, "certified": {"36": 30.0}}

    monkeypatch.setattr(run, "result_of", short)
    args = run.argparse.Namespace(set={}, out=tmp_path, minutes=60.0, search=1.0, held_out=0, seed=0, teacher=0.0)
    found = run.best_change("aol", args)
    lost = [trial for trial in found["tried"] if "dense" in trial["change"]]
    assert [(trial["certified"], trial["diverged"]) for trial in lost] == [(0.0, True)] * 3
    assert "dense" not in found["chosen"]
    assert all(run.is_trial(trial) for trial in found["tried"])


def test_the_finalists_are_the_best_and_the_largest_network_once() -> None:
    changes = run.changes_of("sll")
    rising = [{"change": change, "certified": float(n)} for n, change in enumerate(changes)]
    assert run.finalists(rising, "sll") == [run.OUR_SIZES, changes[5], changes[4]]
    falling = [{"change": change, "certified": -float(n)} for n, change in enumerate(changes)]
    assert run.finalists(falling, "sll") == [*changes[:3], run.OUR_SIZES]
    assert run.finalists(falling[:6], "aoc") == [*changes[:3], run.SEARCH[-1]]


def test_what_set_says_holds_in_the_search_and_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    def short(name: str, args: run.argparse.Namespace) -> dict:
        seen.append(args.set)
        return {"clean": 50.0, "certified": {"36": float(len(seen))}}

    def train(name: str, splits: object, measured: object, args: run.argparse.Namespace, directory: Path) -> dict:
        seen.append(args.set)
        return entry(run.label(name, args), 40.0)

    given = {"lr": 0.25, "depth": [1]}
    args = run.argparse.Namespace(set=given, out=tmp_path, minutes=60.0, search=1.0, held_out=0, seed=0, teacher=0.0)
    with monkeypatch.context() as trials:
        trials.setattr(run, "result_of", short)
        found = run.best_change("cpl", args)
    # Seven, and of these the best three, of which the largest is one; other rates are not asked for.
    assert len(seen) == len(found["tried"]) == 10
    assert all(changes | given == changes for changes in seen)
    assert found["chosen"] == run.changes_of("cpl")[4]
    monkeypatch.setattr(run, "best_change", lambda name, args: {"chosen": run.OUR_SIZES, "minutes": 1.0, "tried": []})
    splits = SimpleNamespace(train=SimpleNamespace(name="d"), test=[0], fingerprint="f")
    monkeypatch.setattr(run, "load_data", lambda *args: splits)
    monkeypatch.setattr(run, "train_peer", train)
    where = ["--data-dir", "nowhere", "--out", str(tmp_path), "--search", "1"]
    monkeypatch.setattr(sys, "argv", ["run.py", *where, "--entries", "cpl", "--set", "lr=0.25", "depth=[1]"])
    run.result_of("cpl", run.parse())
    assert seen[-1] == run.OUR_SIZES | given


def test_a_teacher_takes_its_time_from_the_budget_of_every_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[RunConfig, Path]] = []
    labels = TeacherLabels(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), seconds=630.0)
    images = ImageDataset("two", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    splits = DataSplits(images, None, images, "f")
    monkeypatch.setattr(run, "train_run", lambda config, out, splits=None: trained.append((config, out)))
    monkeypatch.setattr(run, "weights_hash", lambda teacher: "w")
    monkeypatch.setattr(run, "teacher_labels", lambda config, splits, directory, origin: labels)
    monkeypatch.setattr(run, "keep_labels", lambda *given: None)
    where = ["run.py", "--data-dir", "d", "--out", str(tmp_path), "--seed", "2", "--held-out", "7", "--minutes", "60"]
    monkeypatch.setattr(sys, "argv", [*where, "--entries", "ours", "--teacher", "10"])
    args = run.parse()
    assert run.label("ours", args) == "ours-2-taught"
    assert run.taught(splits, args, tmp_path, True) == (tmp_path / "teacher-10-2", labels)
    ((config, place),) = trained
    assert (place, config.model.name, config.data.validation) == (tmp_path / "teacher-10-2", "convnet", 7)
    assert (config.training.max_minutes, config.training.seed) == (10.0, 2)
    assert run.minutes_left(args, labels) == 49.5
    said = {"asked": 10.0, "minutes": 10.5, "share": 0.7, "train_accuracy": 50.0}
    assert run.about_teacher(labels, splits, args) == {"teacher": said}
    taken: dict[str, Any] = {}
    monkeypatch.setattr(run, "fit", lambda model, splits, config, directory, **also: taken.update(also, config=config))
    monkeypatch.setattr(run, "sound_bound", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setitem(peers.FAMILIES, "cpl", peers.Family("here", peers.CPLStep, orthogonal, 4, (1,)))
    with pytest.raises(KeyboardInterrupt):
        run.train_peer("cpl", splits, images, run.argparse.Namespace(**vars(args) | {"set": {"stem": 2}}), tmp_path)
    assert taken["config"].max_minutes == 49.5
    assert taken["describe"]["teacher"] == "w"
    torch.testing.assert_close(taken["soft_labels"], torch.tensor([[0.93, 0.07], [0.42, 0.58]]), rtol=0, atol=1e-6)
    with pytest.raises(InvalidArgument, match=r"took 10\.5 of 9 minutes, which leaves none"):
        run.minutes_left(run.argparse.Namespace(**vars(args) | {"minutes": 9.0}), labels)
    made = entry("ours-2-taught", 50.0, 2) | {"teacher": said, "images": 7, "measured": "held-out"}
    run.require_same(tmp_path, made, args)
    page = run.as_page([made], 60.0)
    assert "taught: the minutes are those of its teacher" in page["caption"]
    assert "--teacher 10" in page["command"]
    with pytest.raises(InvalidArgument, match=r"with teacher 10\.0, asked for is 5\.0"):
        run.require_same(tmp_path, made, run.argparse.Namespace(**vars(args) | {"teacher": 5.0}))
    monkeypatch.setattr(sys, "argv", [*where, "--entries", "ours"])
    assert run.taught(splits, run.parse(), tmp_path, True) == (None, None)


def certificate(radii: list[float], correct: list[bool]) -> CertificateResult:
    predictions = torch.zeros(len(radii), dtype=torch.long)
    labels = torch.where(torch.tensor(correct), 0, 1)
    return CertificateResult(torch.tensor(radii, dtype=torch.float64), predictions, labels, body_lipschitz=1.0)


def test_a_certified_image_that_autoattack_breaks_is_an_error() -> None:
    distances = [None, 0.3, 0.0]
    attack.check(distances, certificate([0.9, 0.29, 0.9], [True, True, False]))
    with pytest.raises(UnsoundResult, match=r"image 1 is certified at radius 0\.6"):
        attack.check(distances, certificate([0.9, 0.6, 0.0], [True, True, True]))


def test_what_autoattack_found_names_its_network_and_goes_where_it_refutes_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("pyautoattack")
    package.__spec__ = ModuleSpec("pyautoattack", None)
    monkeypatch.setitem(sys.modules, "pyautoattack", package)
    test = ImageDataset("d", torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ("a", "b"))
    curve, belongs = Curve(PAPER_EPSILONS, (1.0,) * len(PAPER_EPSILONS), 2), {"weights": "w", "fingerprint": "f"}
    ours = SimpleNamespace(curve=lambda *loss: curve, clean_accuracy=1.0)
    stand_ins = {
        "load_config": lambda run: SimpleNamespace(attack=AttackConfig(), training=SimpleNamespace(device="cpu")),
        "with_data": lambda config, data: config,
        "certify_run": lambda run, data: certificate([0.4, 0.4], [True, True]),
        "attack_run": lambda run, settings, data: ours,
        "load_splits": lambda config: SimpleNamespace(test=test, fingerprint="f"),
        "belongs_to": lambda run, fingerprint, *, same_code: belongs,
        "commit": lambda: "c",
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(attack, name, stand_in)
    options = SimpleNamespace(data_dir=None, samples=2, epsilon=0.5, batch_size=2)
    files = [tmp_path / name for name in ("autoattack.json", "metrics.json", "report.html")]
    for distance, left in ((0.45, [True, True, True]), (0.3, [False, False, False])):
        for file in files:
            file.write_text("{}")
        monkeypatch.setattr(attack, "auto_attack", lambda *given, distance=distance: [distance, None])
        if left[1]:
            facts = attack.measured(tmp_path, options)
            assert facts.items() >= belongs.items()
            assert (facts["autoattack"], facts["images"]) == (0.5, 2)
        else:
            with pytest.raises(UnsoundResult, match=r"image 0 is certified at radius 0\.4"):
                attack.measured(tmp_path, options)
        assert [file.exists() for file in files] == left


class StandIn:
    """AutoAttack that moves the first image of what it is given by 0.25, and can be cut off."""

    ran: ClassVar[list[tuple[str, int]]] = []
    cut_off_in = ""
    exact = False

    def __init__(self, model: nn.Module, *, device: torch.device, **settings: object) -> None:
        assert device == next(model.parameters()).device
        self.attacks_to_run: list[str] = []

    def run_standard_evaluation(self, pixels: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        assert StandIn.exact
        (name,) = self.attacks_to_run
        if name == StandIn.cut_off_in:
            raise KeyboardInterrupt
        StandIn.ran.append((name, len(pixels)))
        moved = pixels.clone()
        moved[0, 0, 0, 0] += 0.25
        return moved, labels


def test_autoattack_goes_on_where_it_was_cut_off_unless_the_weights_or_the_images_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0]])
    monkeypatch.setitem(sys.modules, "pyautoattack", ModuleType("pyautoattack"))
    monkeypatch.setattr(sys.modules["pyautoattack"], "AutoAttack", StandIn, raising=False)

    @contextlib.contextmanager
    def exact() -> Iterator[None]:
        monkeypatch.setattr(StandIn, "exact", True)
        yield
        monkeypatch.setattr(StandIn, "exact", False)

    monkeypatch.setattr(attack, "full_precision", exact)
    monkeypatch.setattr(attack, "load", lambda run: model)
    hashes = ["a"]
    monkeypatch.setattr(attack, "weights_hash", lambda run: hashes[0])
    pixels, labels = torch.zeros(6, 1, 2, 2), torch.tensor([0, 0, 0, 0, 0, 1])
    StandIn.ran.clear()
    monkeypatch.setattr(StandIn, "cut_off_in", "fab-t")
    with pytest.raises(KeyboardInterrupt):
        attack.auto_attack(tmp_path, pixels, labels, 0.5, 2, "these images")
    assert StandIn.ran == [("apgd-ce", 6), ("apgd-t", 4)]
    monkeypatch.setattr(StandIn, "cut_off_in", "")
    distances = attack.auto_attack(tmp_path, pixels, labels, 0.5, 2, "these images")
    assert StandIn.ran[2:] == [("fab-t", 3), ("square", 2)]
    assert distances == [0.25, 0.25, 0.25, 0.25, None, 0.0]
    hashes[0] = "b"
    attack.auto_attack(tmp_path, pixels, labels, 0.5, 2, "these images")
    assert len(StandIn.ran) == 8
    attack.auto_attack(tmp_path, pixels, labels, 0.5, 2, "other images")
    assert len(StandIn.ran) == 12


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 1, 3, padding=1, padding_mode="replicate")])
def test_a_padding_without_a_rule_has_no_bound(layer: nn.Conv2d) -> None:
    with pytest.raises(InvalidArgument, match="padding_mode"):
        peers._layer_bound(layer, (4, 4))


def test_a_layer_too_large_to_be_factorised_keeps_the_bound_of_the_torus() -> None:
    layer = nn.Conv2d(2, 2, 3, padding=1)
    large = peers._layer_bound(layer, (128, 128))
    assert peers._layer_bound(layer, (6, 6)) <= large < 3 * peers._layer_bound(layer, (6, 6))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_the_rescaled_skew_kernel_is_skew_and_of_norm_at_most_one(scale: float) -> None:
    raw = scale * torch.randn(4, 4, 3, 3, dtype=torch.float64)
    raw[0] *= 1e3  # rows of unlike size, where scaling them alone would undo skewness
    kernel = peers.SkewRescaling(reach=1.0)(raw)
    assert torch.equal(kernel, -kernel.flip(2, 3).transpose(0, 1))
    dense = dense_matrix(kernel, ConvGeometry((6, 6), padding=1))
    assert 0.1 < torch.linalg.matrix_norm(dense, 2) <= 1 + 1e-12
    torch.testing.assert_close(peers.SkewRescaling()(raw), 1.5 * kernel, rtol=1e-15, atol=0.0)
    skew = raw - raw.flip(2, 3).transpose(0, 1)
    by_rows = skew * skew_rows(skew)
    assert not torch.allclose(by_rows, -by_rows.flip(2, 3).transpose(0, 1))
    with pytest.raises(InvalidArgument, match="is not skew"):
        peers._series_bound(by_rows, (6, 6))


def skew_rows(kernel: Tensor) -> Tensor:
    """The factors of its rows with which the norm is at most 1."""
    gram = functional.conv2d(kernel, kernel, padding=2).abs().sum((1, 2, 3))
    return gram.rsqrt()[:, None, None, None]


@pytest.mark.parametrize("hostile", [1.0, 1e3])
def test_soc_is_the_series_of_the_exponential_of_its_kernels_matrix(hostile: float) -> None:
    layer = peers.SkewExponential(3).double()
    basis = torch.eye(75, dtype=torch.float64).reshape(-1, 3, 5, 5)
    with torch.no_grad():
        layer.parametrizations.kernel.original[0].mul_(hostile)
        matrix = dense_matrix(layer.kernel, ConvGeometry((5, 5), padding=1))
        found = layer(basis).flatten(1).T
        layer.bias.fill_(0.25)
        torch.testing.assert_close(layer(basis).flatten(1).T, found + 0.25, rtol=0.0, atol=1e-14)
    assert torch.equal(matrix, -matrix.T)
    power = expected = torch.eye(75, dtype=torch.float64)
    for k in range(1, 5):
        power = matrix @ power / k
        expected = expected + power
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-13)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm <= 1.5 * (1 + 1e-12)
    # Taylor's remainder of the exponential of a skew matrix.
    remainder = found - torch.linalg.matrix_exp(matrix)
    assert torch.linalg.matrix_norm(remainder, 2) <= norm**5 / 120 + 1e-12
    values = torch.linalg.svdvals(found)
    assert peers._layer_bound(layer, (5, 5)) == 1.0
    assert values[0] <= 1 + 1e-13
    # 1 − θ⁶/72 + θ⁸/576 falls from 1 at θ = 0 to its value at 1.5.
    assert values[-1] >= (1 - 1.5**6 / 72 + 1.5**8 / 576) ** 0.5 * (1 - 1e-12)


def test_a_series_of_a_kernel_that_is_not_skew_or_too_large_has_no_bound() -> None:
    layer = peers.SkewExponential(4)
    nn.utils.parametrize.remove_parametrizations(layer, "kernel")
    assert peers._layer_bound(layer, (4, 4)) == 1.0
    with torch.no_grad():
        layer.kernel.mul_(1000)
    with pytest.raises(InvalidArgument, match=r"has norm .*at most √8 is allowed"):
        peers._layer_bound(layer, (4, 4))
    with torch.no_grad():
        layer.kernel.div_(1000)
        layer.kernel[1].mul_(1 + 1e-5)
    with pytest.raises(InvalidArgument, match="is not skew"):
        peers._layer_bound(layer, (4, 4))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_gershgorins_scaling_is_that_of_the_dense_matrix_and_bounds_the_step_whatever_q(kernel_size: int) -> None:
    kernel = torch.randn(5, 4, kernel_size, kernel_size, dtype=torch.float64)
    kernel[0] *= 30
    scaling = peers.Gershgorin(5).double()
    with torch.no_grad():
        plain = scaling(kernel)
        scaling.q.copy_(2 * torch.randn(5, dtype=torch.float64))
        scaled, q = scaling(kernel), scaling.q.repeat_interleave(49)
    assert not torch.allclose(scaled, plain)
    # On a torus of 7 pixels no two taps of KKᵀ meet: its rows are those on the plane.
    torus = ConvGeometry((7, 7), padding=kernel_size // 2, padding_mode="circular")
    dense = dense_matrix(kernel, torus)
    rows = ((dense @ dense.T).abs() * torch.exp(q[None, :] - q[:, None])).sum(1)
    torch.testing.assert_close(dense_matrix(scaled, torus), dense / rows.sqrt()[:, None], rtol=1e-12, atol=1e-14)
    for matrix in (dense_matrix(scaled, torus), dense_matrix(scaled, ConvGeometry((4, 4), padding=kernel_size // 2))):
        assert torch.linalg.eigvalsh(matrix.T @ matrix)[-1] <= 1 + 1e-12
        active = (torch.rand(len(matrix), dtype=torch.float64) < 0.5).double()
        step = torch.eye(matrix.shape[1], dtype=torch.float64) - 2 * matrix.T @ (active[:, None] * matrix)
        assert torch.linalg.eigvalsh(step).abs().max() <= 1 + 1e-12


def test_inner_is_the_share_of_rows_and_at_least_one_row() -> None:
    assert peers.CPLStep(8, 4, inner=0.25).kernel.shape == (2, 8, 3, 3)
    assert peers.CPLStep(3, 1, kernel_size=1, inner=0.1).kernel.shape == (1, 3, 1, 1)
    options = {"dense": 1, "dense_layer": peers.FAMILIES["cpl"].dense_layer, "takes_inner": True, "inner": 0.5}
    family = peers.Family("here", peers.CPLStep, orthogonal, 4, (1, 0, 1), **options)
    model = family.build((3, 16, 16), 3, torch.full((3,), 0.5), seed=0)
    steps = [part.kernel.shape for part in model.body if isinstance(part, peers.CPLStep)]
    assert steps == [(2, 4, 3, 3), (8, 16, 3, 3), (32, 64, 1, 1)]
    # The stage of depth 0 has its fold and its map to 8 channels all the same.
    assert [part.out_channels for part in model.body if isinstance(part, nn.Conv2d)] == [4, 8, 16]
    bound = peers.sound_bound(model)
    assert steepest(model, torch.randn(3, 3, 16, 16)) <= bound * (1 + 1e-6)
    with pytest.raises(InvalidArgument, match=r"inner is 0\.5, but the layers of here"):
        replace(family, takes_inner=False)


def searching(name: str, change: dict) -> tuple:
    """What :func:`peer_config` makes of a change."""
    args = {"preset": "certified/cpu-1h", "minutes": 1.0, "seed": 0, "held_out": 0, "data_dir": None, "set": change}
    return run.peer_config(name, run.argparse.Namespace(**args))


@pytest.mark.parametrize("name", sorted(peers.FAMILIES))
def test_every_change_of_a_search_is_one_of_a_family_and_its_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.LOSSES, "lse-hkr", peers.lse_hkr)
    for change in run.changes_of(name):
        family, settings, config = searching(name, change)
        assert all(getattr(config, key) == value for key, value in settings.items())
        for key, value in change.items():
            wanted = tuple(value) if isinstance(value, list) else value
            assert (getattr(family, key) if key in run.FAMILY_SIZES else getattr(config, key)) == wanted


def test_own_recipes_are_those_of_the_authors() -> None:
    cpl, sll, aoc = (searching(name, {})[2] for name in ("cpl", "sll", "aoc"))
    assert (cpl.optimiser, cpl.lr, cpl.momentum, cpl.loss, cpl.margin) == ("adam", 0.001, 0.9, "hinge", 0.7)
    assert (sll.optimiser, sll.lr, sll.momentum, sll.loss) == ("adam", 0.01, 0.5, "offset-cross-entropy")
    assert (sll.offset, sll.temperature) == (pytest.approx(2.1213, abs=1e-4), 0.25)
    assert (aoc.optimiser, aoc.lr, aoc.batch_size) == ("nesterov", 0.006, 256)
    assert searching("cpl", run.ADAM | run.OUR_LOSS)[2].loss == "offset-cross-entropy"
    assert searching("sll", run.ADAM)[2].momentum == 0.9


def test_each_family_is_offered_the_common_changes_and_those_for_it() -> None:
    common = list(run.SEARCH)
    assert run.changes_of("aoc") == run.changes_of("soc") == run.changes_of("aol") == run.changes_of(None) == common
    assert run.changes_of("cpl") == run.changes_of("sll") == [*common, run.OUR_SIZES]
    assert run.changes_of("torchlip") == common + list(peers.FAMILIES["torchlip"].search)
    assert len(peers.FAMILIES["torchlip"].search) == 3
    # Ours are the sizes and the recipe of our preset.
    preset = preset_settings("certified/cpu-1h", "certified", "cifar10")
    model, training, ours = preset["model"], preset["training"], run.OUR_SIZES
    assert (ours["stem"], ours["width"], ours["depth"]) == (model["stem"], model["widths"][0], list(model["layers"]))
    assert (ours["dense"], ours["inner"]) == (model["dense_layers"], model["dense_rows"])
    assert ours["inner"] == model["rows"]
    for name in ("optimiser", "momentum", "lr", "loss", "offset", "temperature", "batch_size"):
        assert ours[name] == training[name]


def test_importing_the_benchmark_adds_no_loss_to_the_library() -> None:
    assert "lse-hkr" not in run.LOSSES


def test_lse_hkr_is_the_packages_formula_of_logits_over_the_margin() -> None:
    pytest.importorskip("deel.torchlip", reason="needs the peers' packages, see benchmarks/certified/run.py")
    logits, labels = torch.randn(6, 10, dtype=torch.float64), torch.tensor([0, 3, 9, 3, 1, 7])
    found = peers.lse_hkr(run.TrainingConfig(margin=0.2))(logits, labels)
    scaled = logits / 0.2
    right = scaled.gather(1, labels[:, None]).squeeze(1)
    sharpness = 2 * torch.tensor(9.0, dtype=torch.float64).log()
    wrong = torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in zip(scaled, labels.tolist(), strict=True)])
    wrong = torch.logsumexp(sharpness * wrong, 1) / sharpness
    hinge = (0.5 - right).clamp_min(0) + (0.5 + wrong).clamp_min(0)
    torch.testing.assert_close(found, (0.1 * (wrong - right) + 0.9 * hinge).mean(), rtol=1e-6, atol=0.0)
    with pytest.raises(InvalidArgument, match="margin is 0"):
        peers.lse_hkr(run.TrainingConfig(margin=0.0))


def test_sll_starts_from_the_size_its_authors_mean() -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    block = peers.FAMILIES["sll"].layer(32, 16)
    assert float(block.parametrizations.kernel.original.detach().std()) == pytest.approx(
        2**0.5 / (9 * 64) ** 0.5, rel=0.1
    )


def test_slls_q_is_learned_and_its_rows_are_as_many_as_asked_for() -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    layer = peers.FAMILIES["sll"].layer
    assert [layer(49, 4, inner=rows / 49).kernel.shape[0] for rows in (1, 7, 49)] == [1, 7, 49]
    block = layer(6, 4, inner=0.5)
    block(torch.randn(2, 6, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in block.parameters())


@pytest.mark.parametrize(("name", "kind"), [("aoc", "mix"), ("aol", "mix"), ("aol", "dense"), ("soc", "dense")])
def test_maps_of_one_tap_start_without_bias_and_have_no_padding(name: str, kind: str) -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    family = peers.FAMILIES[name]
    conv = family.mix(8, 4) if kind == "mix" else family.dense_layer(8)[0]
    assert not conv.bias.any()
    assert (conv.padding, conv.padding_mode) == ((0, 0), "zeros")
    assert peers._layer_bound(conv, (1, 1)) <= 1 + 1e-4


def test_the_dense_layers_by_cholesky_have_the_gradient_of_their_formula() -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    conv = peers.FAMILIES["aoc"].dense_layer(5)[0].double()
    original, direction = conv.parametrizations.weight.original, torch.randn(5, 5, dtype=torch.float64)
    with torch.no_grad():
        original.add_(0.3 * torch.randn_like(original))
    (conv.weight[:, :, 0, 0] * direction).sum().backward()
    raw = original.detach()[:, :, 0, 0].clone().requires_grad_()
    factor = torch.linalg.cholesky(raw @ raw.T + 1e-5 * torch.eye(5, dtype=torch.float64))
    expected = torch.linalg.solve_triangular(factor, raw, upper=False)
    torch.testing.assert_close(conv.weight.detach()[:, :, 0, 0], expected.detach(), rtol=1e-10, atol=1e-10)
    (expected * direction).sum().backward()
    torch.testing.assert_close(original.grad[:, :, 0, 0], raw.grad, rtol=1e-8, atol=1e-8)


def test_a_nearly_singular_dense_layer_is_factorised_in_float64() -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    conv = peers.FAMILIES["soc"].dense_layer(4)[0]
    original = conv.parametrizations.weight.original
    with torch.no_grad():
        original.fill_(128.0)  # XXᵀ is 2¹⁶ everywhere, and float32 has no 2¹⁶ + 10⁻⁵
    raw = original.detach()[:, :, 0, 0].double()
    gram = raw @ raw.T + 1e-5 * torch.eye(4, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram.float())
    expected = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), raw, upper=False)
    weight = conv.weight[:, :, 0, 0]
    torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=1e-7)
    weight.sum().backward()
    assert bool(original.grad.isfinite().all())


@pytest.mark.parametrize("name", ["soc", "sll", "cpl", "aoc"])
def test_what_claims_the_constant_one_has_it_by_our_bound(name: str) -> None:
    pytest.importorskip("orthogonium", reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    family = replace(peers.FAMILIES[name], width=4, depth=(2, 1, 0), dense=1)
    if family.takes_inner:
        family = replace(family, inner=0.5)
    model = family.build((3, 16, 16), 3, torch.full((3,), 0.5), seed=0)
    with torch.no_grad(), torch.nn.utils.parametrize.cached():
        assert peers.sound_bound(model.eval()) <= 1 + 1e-4


@pytest.mark.parametrize("name", sorted(peers.FAMILIES))
def test_the_sound_bound_of_every_family_is_above_its_jacobians(name: str) -> None:
    package = "deel.torchlip" if name == "torchlip" else "orthogonium"
    pytest.importorskip(package, reason="needs the peers' packages on the path, see benchmarks/certified/run.py")
    family = replace(peers.FAMILIES[name], width=4, depth=(1, 1, 0), dense=1)
    model = family.build((3, 16, 16), 3, torch.full((3,), 0.5), seed=0)
    with torch.no_grad(), torch.nn.utils.parametrize.cached():
        bound = peers.sound_bound(model.eval())
    assert steepest(model, torch.rand(2, 3, 16, 16)) <= bound * (1 + 1e-5)


def entry_folder(folder: Path, radii: list[float], **facts: object) -> Path:
    run.keep_radii(folder, torch.tensor(radii), torch.tensor(radii))
    run.write_json(folder / "result.json", {"data": "d", "images": len(radii), "measured": "test"} | facts)
    return folder


def test_two_networks_are_compared_image_by_image(tmp_path: Path) -> None:
    first = entry_folder(tmp_path / "a", [0.3, 0.3, 0.3, 0.3, 0.3, 0.0])
    second = entry_folder(tmp_path / "b", [0.3, 0.2, 0.0, 0.0, 0.1, 0.3])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in compare.table(first, second).splitlines()[2:]]
    assert [row[0] for row in rows] == ["0/255", "36/255", "72/255", "108/255", "255/255"]
    # At 36/255 (0.141) the first alone has images 2, 3, 4 and the second alone image 5; at 255/255 none has any.
    assert rows[1][1:4] == ["83.33", "50.00", "+33.33"]
    assert rows[4][1:] == ["0.00", "0.00", "+0.00", "0.00", "1"]


def test_a_pair_of_different_seeds_is_told(tmp_path: Path) -> None:
    first, second = entry_folder(tmp_path / "a", [0.3], seed=2), entry_folder(tmp_path / "b", [0.2], seed=0)
    assert "The seeds differ (2 and 0)" in compare.table(first, second)
    assert "seeds differ" not in compare.table(first, first)


def test_the_paired_error_is_that_of_the_mean_of_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 500, generator=generator) > torch.tensor([[0.3], [0.5]])
    more, error, p = compare.paired(first, second)
    differences = first.double() - second.double()
    assert more == pytest.approx(100 * float(differences.mean()))
    assert error == pytest.approx(100 * float(differences.std(correction=0)) / 500**0.5)
    assert 0 < p < 1e-6
    assert compare.paired(first, first) == (0.0, 0.0, 1.0)


def test_what_cannot_be_paired_gets_a_sentence(tmp_path: Path) -> None:
    first = entry_folder(tmp_path / "a", [0.3])
    with pytest.raises(InvalidArgument, match="differ in measured"):
        compare.table(first, entry_folder(tmp_path / "b", [0.3], measured="held-out"))
    drawn = [entry_folder(tmp_path / f"seed {seed}", [0.3], measured="held-out", seed=seed) for seed in (0, 1)]
    with pytest.raises(InvalidArgument, match="differ in seed"):
        compare.table(*drawn)
    copies = [entry_folder(tmp_path / copy, [0.3], fingerprint=copy) for copy in ("one", "two")]
    with pytest.raises(InvalidArgument, match="are of images with other fingerprints"):
        compare.table(*copies)
    assert compare.table(first, copies[0]), "an earlier result does not say of which copy it is"
    bare = tmp_path / "c"
    run.write_json(bare / "result.json", {"data": "d", "images": 1, "measured": "test"})
    with pytest.raises(BadData, match="no radii of single images"):
        compare.table(first, bare)
    run.keep_radii(bare, torch.tensor([0.3, 0.2]), torch.tensor([0.3, 0.2]))
    with pytest.raises(BadData, match="no radii of single images"):
        compare.table(first, bare)
    for text in ("[]", "{}", '{"images": "x"}'):
        (bare / "result.json").write_text(text)
        with pytest.raises(BadData, match="does not say of how many images"):
            compare.table(bare, first)


def test_a_peer_whose_layer_was_mended_since_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--data-dir", "nowhere", "--out", str(tmp_path)])
    settings = {"settings": {"family": "soc"}}
    for source, kept in ((peers.FAMILIES["soc"].source, True), ("orthogonium 0.0.4, AdaptiveSOCConv2d", False)):
        run.write_json(tmp_path / "soc-0" / "result.json", entry("soc-0", 40.0) | settings | {"source": source})
        if kept:
            assert run.result_of("soc", run.parse())["clean"] == 60.0
        else:
            with pytest.raises(InvalidArgument, match="with source 'orthogonium"):
                run.result_of("soc", run.parse())


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_the_share_of_the_radius_is_that_of_the_jacobian(step: float) -> None:
    config = ModelConfig("certified", widths=(4,), layers=(2,), stem=1, dense_layers=1, dense_step="potential")
    network, pixels = build(config, (4, 4, 4), 3).double().eval(), torch.rand(5, 4, 4, 4, dtype=torch.float64)
    set_progress(network, step)
    found = radius_lost.shares(network, pixels)
    weight, order = network.head.weight.detach(), network(pixels).topk(2, 1).indices
    rows = weight[order[:, 0]] - weight[order[:, 1]]
    pulled = (rows.unsqueeze(1) @ jacobians(network.body, pixels)).squeeze(1).norm(dim=1) / rows.norm(dim=1)
    assert [place for place, _ in found[:1] + found[-1:]] == ["pixels", "DynamicalBlock"]
    assert found[0][1] == pytest.approx(float(pulled.mean()), rel=1e-12)
    assert found[-1][1] == pytest.approx(1.0, rel=1e-12)
    # Steps of 2 along orthonormal rows keep gradient norms, shorter ones and divided rows lose some.
    behind = dict(found)["Flatten"]
    assert behind < 1
    assert (found[0][1] == pytest.approx(behind, rel=1e-12)) == (step == 1.0)
