"""The report's files, of studies made up by hand."""

import math
import re
import sys

import numpy as np
import optax
import pytest

from jaxlm.ablation import report, stats, tables
from jaxlm.ablation.findings import Findings
from jaxlm.ablation.outcomes import Curve, Outcome
from jaxlm.ablation.stats import Comparison, Noise

NASTY = '</script><b>&"x|_$y$'
EFFECTS = {"baseline": 0.0, "no weight decay": 0.021, "longer warmup": -0.002, NASTY: -0.019, "peak without limit": 0.4}
PEAKS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
AXIS = "optimizer.peak"


def study(effects=EFFECTS, seeds=(0, 1, 2, 3, 4), peaks=PEAKS, **changes) -> Findings:
    """Loss curves that end at 3.5 + the variant's effect; the last variant diverges on all seeds but one."""
    outcomes = []
    for i, (variant, effect) in enumerate(effects.items()):
        fragile = variant == "peak without limit"
        tuned = [(peak, 100, True, peak > (0.003 if fragile else 0.01)) for peak in peaks]
        compared = [(0.003, seed, False, fragile and seed > 0) for seed in seeds]
        for peak, seed, tunes, diverges in tuned + compared:
            shared, own = np.random.default_rng(seed), np.random.default_rng([seed, i])
            end = 3.5 + effect + 0.006 * shared.normal() + 0.003 * own.normal() + 0.02 * math.log10(peak / 0.003) ** 2
            steps = np.arange(0, 1001, 50)
            values = end + 7.3 * np.exp(-steps / 90) + 0.2 * np.exp(-steps / 500) - 0.2 * math.exp(-2)
            if diverges:
                values[12:] = np.nan
            tokens, rate = steps * 8192, 1 + 0.1 * i
            curve = Curve(steps, tokens, tokens * 6.3e6 * rate, steps * 0.21 * rate, values, values - 0.05)
            outcomes.append(
                Outcome(
                    trial=f"{i}{seed}{peak:g}",
                    variant=variant,
                    seed=seed,
                    point={AXIS: peak} if peaks else {},
                    tuning=tunes,
                    status="diverged" if diverges else "done",
                    value=math.nan if diverges else float(values[-1]),
                    curve=curve,
                    tokens=int(tokens[-1]),
                    flops=float(curve.flops[-1]),
                    seconds=float(curve.seconds[-1]),
                    joules=math.nan if i == 1 else 5200.0,
                )
            )
    values = {
        variant: {one.seed: one.value for one in outcomes if one.variant == variant and not one.tuning}
        for variant in effects
    }
    findings = Findings(
        name="regularization",
        question="Which <regularization> & warmup does a small GPT-2 need?",
        metric="eval/loss",
        lower_is_better=True,
        baseline="baseline",
        variants=list(effects),
        seeds=list(seeds),
        budget="8,192,000 training tokens a trial",
        outcomes=outcomes,
        comparisons=[comparison(variant, values) for variant in effects if variant != "baseline"],
        noise=noise(values["baseline"]),
        differences={variant: {"optimizer.weight_decay": (0.1, i / 10)} for i, variant in enumerate(effects) if i},
        chosen={variant: {AXIS: 0.003} for variant in effects} if peaks else {},
        warnings=["peak without limit diverged on 4 of 5 seeds."],
        verdict="Weight decay helps: without it the loss is 0.0210 higher. Longer warmup shows no difference.",
        command="python -m jaxlm.sweep experiments/regularization.py --seeds 5",
    )
    return findings._replace(**changes)


def comparison(variant: str, values: dict[str, dict[int, float]]) -> Comparison:
    """Near to what `stats.compare` finds: here only the form matters."""
    pairs = {seed: value - values["baseline"][seed] for seed, value in values[variant].items()}
    pairs = {seed: difference for seed, difference in pairs.items() if math.isfinite(difference)}
    mean = float(np.mean([*pairs.values()])) if pairs else math.nan
    spread = float(np.std([*pairs.values()], ddof=1)) if len(pairs) > 1 else math.nan
    half = 3.5 * spread / math.sqrt(max(len(pairs), 1))
    p = min(1.0, 0.05 * half / abs(mean)) if mean else 1.0
    lost = {name: tuple(seed for seed, value in values[name].items() if math.isnan(value)) for name in values}
    found = "better" if mean + half < 0 else "worse" if mean - half > 0 else "no difference shown"
    return Comparison(
        variant=variant,
        seeds=tuple(pairs),
        lost=lost[variant],
        baseline_lost=lost["baseline"],
        mean=mean,
        deviation=spread,
        interval=(mean - half, mean + half),
        bootstrap=(mean - half / 2, mean + half / 2),
        p=p / 4,
        p_corrected=p,
        p_sign=0.0625 if len(pairs) == 5 else math.nan,
        p_lost=math.nan,
        correlation=0.81 if len(pairs) > 1 else math.nan,
        smallest=2.1 * spread,
        needed=None if math.isnan(spread) else 9,
        verdict="nothing can be concluded" if math.isnan(spread) else found,
    )


def noise(values: dict[int, float]) -> Noise | None:
    finite = [value for value in values.values() if math.isfinite(value)]
    if len(finite) < 2:
        return None
    spread = float(np.std(finite, ddof=1))
    return Noise(len(finite), float(np.mean(finite)), spread, 2.776 * spread * math.sqrt(2 / len(finite)))


def test_all_files_are_written_and_nothing_else_is_left(tmp_path):
    written = report.write(study(), tmp_path / "new" / "report")
    names = [
        "report.md",
        "report.html",
        "ranking.tex",
        "results.csv",
        "results.parquet",
        "curves.csv",
        "ranking.png",
        "curves.png",
        "sensitivity.png",
    ]
    assert [path.name for path in written] == names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new" / "report").iterdir())
    assert report.write(study(), tmp_path / "new" / "report") == written  # over what is there


def test_markdown_says_what_was_found(tmp_path):
    findings = study()
    text = report.write(findings, tmp_path)[0].read_text()
    assert text.startswith("# Which \\<regularization> & warmup does a small GPT-2 need?\n\n**Weight decay helps")
    found, noise = findings.comparisons[0], findings.noise
    assert re.search(r"^\| no weight decay \| worse \| 3\.\d{4} ± 0\.\d{4} \| \+0\.0\d{3} \|", text, re.MULTILINE)
    assert f"| {found.mean:+.4f} | [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}] |" in text
    assert f"{noise.mean:.4f} ± {noise.deviation:.4f}" in text and f"noise floor ±{noise.floor:.4f}" in text
    for part in ("Smallest effect", findings.warnings[0], findings.command, "1 of 5, 4 diverged", "not measured"):
        assert part in text
    assert "| no weight decay | optimizer.weight_decay | 0.1 | 0.1 |" in text  # no escapes that nobody needs
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {10, 5, 8, 14}  # columns + 1, of every table


def test_costs_have_joules_a_token_and_carbon_where_it_is_known():
    findings = study({"baseline": 0.0, "other": 0.0})
    costs = tables.tables(findings)["costs"]
    assert costs.headers[-1] == "Joules per token"
    assert [row[-1].text for row in costs.rows] == [f"{5200 / 8_192_000:.3g}", "not measured"]
    some = [one._replace(gco2e=1.5) if one.variant == "baseline" else one for one in findings.outcomes]
    costs = tables.tables(findings._replace(outcomes=[some[0]._replace(joules=math.nan), *some[1:]]))["costs"]
    assert costs.headers[-1] == "CO2e"
    assert [row[-1].text for row in costs.rows] == ["15 g", "not measured"]
    assert costs.rows[0][-2].text == f"{5200 / 8_192_000:.3g}"  # of the trials that were measured


def test_a_trial_of_several_points_costs_once():
    findings = study({"baseline": 0.0, "other": 0.0})
    twice = findings._replace(outcomes=[*(one._replace(tuning=True) for one in findings.outcomes), *findings.outcomes])
    assert tables.tables(twice)["costs"] == tables.tables(findings)["costs"]


def test_ranking_is_best_first_and_the_diverged_last(tmp_path):
    effects = EFFECTS | {"always diverges": math.nan}
    text = report.write(study(effects), tmp_path)[0].read_text()
    rows = [line.split(" | ")[0].strip("| ") for line in text.split("## Ranking")[1].split("\n\n")[1].splitlines()[2:]]
    assert rows[0].startswith("\\</script") and rows[-1] == "always diverges"
    assert rows.index("longer warmup") < rows.index("baseline") < rows.index("no weight decay")


def test_what_lost_seeds_is_ranked_below_all_that_lost_none_and_says_so(tmp_path):
    """By the one seed that is left, an arm that diverged on four of five would be the first."""
    effects = {"baseline": 0.0, "bad": 1.0, "peak without limit": -1.0, "always": math.nan}
    made = study(effects, peaks=())
    values = {name: {one.seed: one.value for one in made.outcomes if one.variant == name} for name in effects}
    made = made._replace(comparisons=stats.compare(values, "baseline"))
    made = made._replace(
        outcomes=[one._replace(status="diverged") if math.isnan(one.value) else one for one in made.outcomes]
    )
    rows = [[cell.text for cell in row] for row in tables.tables(made)["ranking"].rows]
    assert [row[0] for row in rows] == ["baseline", "bad", "peak without limit", "always"]
    assert rows[2][1] == "nothing can be concluded; diverged on 4 of 5 seeds"
    assert rows[3][1] == "diverged on 5 of 5 seeds"
    report.write(made, tmp_path)
    for name in ("report.md", "report.html"):
        assert "diverged on 5 of 5 seeds" in (tmp_path / name).read_text()


def test_without_the_extras_there_is_still_a_report(tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "plotly.offline", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [path.name for path in report.write(study(), tmp_path)] == [
        "report.md",
        "ranking.tex",
        "results.csv",
        "curves.csv",
    ]
    assert "ranking.png" not in (tmp_path / "report.md").read_text()


UNUSUAL = {
    "one seed": lambda: study(seeds=(0,), noise=None),
    "no variant": lambda: study({"baseline": 0.0}),
    "nothing tuned": lambda: study({"baseline": 0.0, "other": 0.0}, peaks=()),
    "all diverged": lambda: study({"baseline": math.nan, "other": math.nan}, peaks=()),
    "not begun": lambda: study(outcomes=[], comparisons=[], noise=None, differences={}, chosen={}),
    "many long names": lambda: study(
        {"baseline": 0.0} | {f"variant {i} of a very long name that no plot has room for": i for i in range(12)}
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_studies_are_reported_too(tmp_path, name):
    written = report.write(UNUSUAL[name](), tmp_path)
    assert tmp_path / "report.html" in written
    assert (tmp_path / "sensitivity.png" in written) == (name in ("one seed", "no variant", "many long names"))


@pytest.mark.parametrize("scale", [1e-9, 1e100])
def test_a_metric_of_any_size_is_read_in_a_few_digits(tmp_path, scale):
    def scaled(one):
        return one._replace(value=one.value * scale, curve=one.curve._replace(values=one.curve.values * scale))

    outcomes = [scaled(one) for one in study({"baseline": 0.0, "other": 0.1}, peaks=()).outcomes]
    values = {name: {one.seed: one.value for one in outcomes if one.variant == name} for name in ("baseline", "other")}
    made = study({"baseline": 0.0, "other": 0.1}, peaks=())._replace(
        outcomes=outcomes, comparisons=stats.compare(values, "baseline"), noise=stats.noise(values["baseline"])
    )
    report.write(made, tmp_path)
    text = (tmp_path / "report.md").read_text()
    numbers = re.findall(r"\d+\.\d+(?:e[+-]\d+)?", text[: text.index("**Paired seeds")])
    assert max(map(len, numbers)) < 12 and not re.search(r"0\.0000+\b", text)
    assert re.search(r"\| 3\.\d+" + re.escape(f"e{math.log10(scale):+03.0f} ± ") + r"\d\.\d+e", text)
    assert "\\u003c" not in text and ":.4~g}" in (tmp_path / "report.html").read_text()


def test_a_point_of_functions_is_written_by_their_names(tmp_path):
    """Else the addresses of the process would make another report of each call."""
    made = study({"baseline": 0.0}, peaks=())
    spec = {"chain": ("mine",), "mine": {"transform": optax.scale_by_sign}}
    points = ({"optimizer": study}, {"optimizer": spec})
    outcomes = [one._replace(point=points[i % 2]) for i, one in enumerate(made.outcomes)]
    report.write(made._replace(outcomes=outcomes, chosen={"baseline": points[0]}), tmp_path)
    for name in ("report.md", "report.html", "results.csv"):
        text = (tmp_path / name).read_text()
        assert " at 0x" not in text
    assert "<tests.ablation.test_report.study>" in (tmp_path / "results.csv").read_text()


def test_a_run_whose_metric_is_nan_at_the_end_counts_as_diverged():
    made = study({"baseline": 0.0, "other": 0.1}, peaks=())
    outcomes = [one._replace(value=math.nan) if one.seed < 2 else one for one in made.outcomes]
    rows = tables.tables(made._replace(outcomes=outcomes))["ranking"].rows
    assert [row[-1].text for row in rows] == ["3 of 5, 2 diverged"] * 2
    waiting = [one._replace(value=math.nan, status="running") if one.seed < 2 else one for one in made.outcomes]
    rows = tables.tables(made._replace(outcomes=waiting))["ranking"].rows
    assert [row[-1].text for row in rows] == ["3 of 5"] * 2
