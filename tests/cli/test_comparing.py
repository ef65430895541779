"""`diff`, `decisions`, the gate in `history`, and what `promote --override` asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpress import decisions, errors, pointer
from modelpress.reports import Check, Decision, Override
from modelpress.store import Store
from tests.cli.conftest import Run

CHECK = Check(name="compression ratio", verdict="fail", reason="1.00×, at least 4× is asked")
REFUSED = Decision(
    promote=False, verdict="fail", reasons=["compression ratio: fail, 1.00×, at least 4× is asked"], checks=[CHECK]
)
FORCED = REFUSED.model_copy(update={"promote": True, "override": Override(by="Anna", reason="it is Friday")})


def keep(store: Store, pack: str, decision: Decision) -> decisions.Record:
    return decisions.keep(store, "scale", pack, "champion", decision, champion=None, after=0, gate={})


def test_diff_shows_what_changed(packs: list[str], run: Run) -> None:
    code, out, _ = run("diff", f"scale@{packs[0]}", "@champion")
    assert code == 0
    assert out.startswith(f"scale {packs[0]}\n→ scale {packs[1]}\n")
    row = next(line for line in out.splitlines() if line.startswith("weight "))
    assert "values" in row
    assert row.count("F32 64×10") == 2
    assert "0 tensors are the same" in out
    assert "quality: not compared, scale@" in out
    document = json.loads(run("diff", f"scale@{packs[0]}", "scale", "--json")[1])
    assert (document["before"]["pack"], document["after"]["pack"]) == (packs[0], packs[1])
    assert document["tensors"][0]["what"] == "values"
    assert "the same pack" in run("diff", "scale", f"@{packs[1][:12]}")[1]
    assert run("diff", "scale", "other")[0] == errors.StoreError.exit_code


def test_decisions_of_a_name_and_of_a_pack(packs: list[str], store: Store, run: Run) -> None:
    code, _, err = run("decisions", "scale")
    assert (code, "none is kept" in err) == (errors.StoreError.exit_code, True)
    keep(store, packs[0], REFUSED), keep(store, packs[1], FORCED)
    code, out, _ = run("decisions", "scale")
    second, first = out.splitlines()[1:]
    assert code == 0
    assert first.split()[-3:] == ["fail", "no", packs[0]]
    assert "fail, overridden by Anna: it is Friday" in second
    assert second.split()[-2:] == ["yes", packs[1]]
    told = run("decisions", f"scale@{packs[0][:12]}")[1]
    assert "  compression ratio: fail, 1.00×, at least 4× is asked" in told
    assert packs[1] not in told
    document = json.loads(run("decisions", "scale@champion", "--json")[1])
    assert document[0]["record"]["decision"]["override"] == {"by": "Anna", "reason": "it is Friday"}


def test_a_damaged_decision_is_shown_and_hides_no_other(packs: list[str], store: Store, run: Run) -> None:
    keep(store, packs[0], REFUSED)
    record = keep(store, packs[1], FORCED)
    key = f"packs/scale/decisions/{packs[1]}/{record.digest}.json"
    store.put(key, b"{}")
    code, out, _ = run("decisions", "scale")
    assert code == 0
    assert packs[0] in out
    assert "sha256 " in out
    assert packs[1] in out


def test_decisions_come_in_pages_and_one_that_is_gone_is_shown(packs: list[str], store: Store, run: Run) -> None:
    made = [keep(store, packs[0], REFUSED) for _ in range(3)]
    code, out, err = run("decisions", "scale", "--limit", "2", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    following = err.split("modelpress ")[1].split()
    assert len(json.loads(run(*following, "--json")[1])) == 1
    store.delete(f"packs/scale/decisions/{packs[0]}/{made[0].digest}.json")
    rows = json.loads(run("decisions", "scale", "--json")[1])
    assert [row["problem"] for row in rows] == [None, None, f"deleted: {made[1].digest[:12]} came after it"]
    assert f"deleted: {made[1].digest[:12]} came after it" in run("decisions", "scale")[1]


def test_history_says_what_the_gate_said(packs: list[str], store: Store, run: Run) -> None:
    record = keep(store, packs[0], FORCED)
    said = FORCED.model_dump(mode="json") | {decisions.RECORD: record.digest}
    pointer.append(store, "scale", "champion", packs[0], "override", said)
    pointer.append(store, "scale", "champion", packs[1], "odd", {"words": "of a caller"})
    rows = run("history", "scale")[1].splitlines()
    assert rows[0].split() == ["number", "when", "who", "why", "gate", "pack"]
    assert rows[2].split()[-2:] == ["–", packs[1]]
    assert "override  fail, overridden by Anna: it is Friday" in rows[3]
    assert rows[4].split()[-2:] == ["?", packs[1]]
    store.delete(f"packs/scale/decisions/{packs[0]}/{record.digest}.json")
    assert f"entry 3: the decision {record.digest} that it rests on is gone" in run("history", "scale")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--override", "because"], "no name of who does"),
        (["--by", "Anna"], "no reason"),
        (["--override", " ", "--by", "Anna"], "no reason"),
        (["--override", "because", "--by", " "], "no name of who does"),
        (["--override", "x" * 1001, "--by", "Anna"], "at most 1000"),
        (["--override", "because", "--by", "A" * 101], "at most 100"),
    ],
)
def test_an_override_has_a_name_and_a_reason(packs: list[str], run: Run, arguments: list[str], said: str) -> None:
    code, _, err = run("promote", "scale", packs[0], *arguments)
    assert code == errors.ConfigError.exit_code
    assert said in err


def test_conditions_from_a_file_are_checked_before_anything_is_judged(
    packs: list[str], run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("margn: 0.01\n")
    code, _, err = run("promote", "scale", packs[0], "--gate", str(path))
    assert code == errors.ConfigError.exit_code
    assert "margn" in err
    path.write_text("margin: 0.01\n")
    code, _, err = run("promote", "scale", packs[0], "--gate", str(path), "--judge-only", "--canary", "default")
    assert code == errors.ConfigError.exit_code
    assert "--judge-only" in err
