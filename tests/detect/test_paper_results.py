"""The paper's tables: copied right, means recomputed, contradictions listed."""

from pathlib import Path

import numpy as np
import pytest

from voxelbridge.detect.paper_results import inconsistencies, load_paper, mean_ranks

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "packages/detect/src/voxelbridge/detect/paper_results.toml"

INCONSISTENCIES = [
    "table 3, mAP mean ranks: they add up to 189.07, but the ranks of 20 methods to 210",
    (
        "table 3, mAP mean ranks: 19 of 20 are multiples of 1/9, 1 of 1/8 alone; there are 8 data"
        " sets"
    ),
    "table 3, FROC mean ranks: they add up to 165.21, but the ranks of 20 methods to 210",
    (
        "table 3, FROC mean ranks: 19 of 20 are multiples of 1/9, 1 of 1/8 alone; there are 8 "
        "data sets"
    ),
    "table 3, resenc_defdetr, FROC D07: bold is voco, the best is mae",
    (
        "section 3: the four-channel stem performed best; table 2, resenc_retunet: one_channel "
        "86.12, four_channels 85.11"
    ),
    (
        "section 3: the four-channel stem performed best; table 2, resenc_defdetr: random 88.28, "
        "four_channels 87.28"
    ),
    (
        "section 3: pre-trained models are better than models trained from scratch, whatever the "
        "architecture; table 3, mAP mean: resenc_retunet/mt 79.40, resenc_retunet/none-fixed "
        "80.01; resenc_retunet/mae 79.88, resenc_retunet/none-fixed 80.01; resenc_retunet/s3d "
        "79.96, resenc_retunet/none-fixed 80.01"
    ),
    (
        "section 3: VoCo is worse than training from scratch; table 3, mAP mean: "
        "resenc_defdetr/none-default 78.12, resenc_defdetr/voco 78.34; resenc_defdetr/none-fixed "
        "77.58, resenc_defdetr/voco 78.34"
    ),
    (
        "section 3: fixed spacing has the better rank than the default; table 3, mAP mean_rank: "
        "resenc_defdetr/none-fixed 11.44, resenc_defdetr/none-default 10.63"
    ),
    (
        "section A.1, D01: MAE is slightly better than fixed for ResEnc-RetUNet; table 3, mAP "
        "D01: resenc_retunet/mae 83.73, resenc_retunet/none-fixed 83.75"
    ),
    (
        "section A.1, D02: of the self-supervised methods only VoCo gains for ResEnc-RetUNet; "
        "table 3, mAP D02: resenc_retunet/none-fixed 79.35, resenc_retunet/mg 79.36"
    ),
    (
        "section A.1, D04: fixed and pre-trained models are better than default; table 3, mAP "
        "D04: resenc_defdetr/voco 63.72, resenc_defdetr/none-default 64.30"
    ),
    (
        "section A.1, D05: VoCo is worse than the reconstruction methods; table 3, mAP D05: "
        "resenc_defdetr/mae 81.82, resenc_defdetr/voco 82.72; resenc_defdetr/s3d 82.14, "
        "resenc_defdetr/voco 82.72; resenc_defdetr/mg 81.41, resenc_defdetr/voco 82.72"
    ),
    (
        "section A.1, D06: reconstruction methods gain on fixed for ResEnc-DefDETR, not for "
        "ResEnc-RetUNet; table 3, mAP D06: resenc_retunet/none-fixed 83.69, resenc_retunet/s3d "
        "83.82"
    ),
    "section 3: a learning rate of 0.1 was best, table 2 has 1e-2 and 1e-3 only",
    (
        "table 2, caption: five development data sets are announced, mAP is printed for four (D05"
        " only for the stems)"
    ),
    "table 3: MAE is cited as [20], in section 2.2 as [30]",
    (
        "section C.3: 5 % of 50 epochs of 2,500 iterations are 6,250 iterations, not 7,500 (3 "
        "epochs)"
    ),
]


def test_the_copy_in_docs_is_the_shipped_file() -> None:
    assert (ROOT / "docs/paper_results.toml").read_bytes() == SHIPPED.read_bytes()


def test_every_number_of_the_tables_is_in_the_paper(shared: Path) -> None:
    text = (shared / "paper/the_missing_piece.md").read_text(encoding="utf-8")
    plain = text.replace("<b>", "").replace("</b>", "")
    paper = load_paper()
    for row in paper.table3:
        for measure in ("map", "froc"):
            cells = "\t".join(f"{value:.2f}" for value in row.values[measure].values())
            label = row.printed.partition(", ")[2]
            assert f"{label}\t" in plain
            assert plain.count(cells) == 1, (row.name, measure)
            bold = [name in row.bold[measure] for name in row.values[measure]]
            marked = "\t".join(
                f"<b>{value:.2f}</b>" if is_bold else f"{value:.2f}"
                for value, is_bold in zip(row.values[measure].values(), bold, strict=True)
            )
            assert marked in text, (row.name, measure)
    for each in paper.table2:
        cells = [*each.map, each.map_mean]
        texts = [("OOM", "-")[i == 4] if v is None else f"{v:.2f}" for i, v in enumerate(cells)]
        stems = [f"{value:.2f}" for value in each.stem.values()] or ["-"] * 3
        line = "\t".join([*texts, f"{each.map_mean_rank:.2f}", *stems])
        assert plain.count(line) == 1, each
    for data in paper.table1:
        images = "/".join(str(n) for n in data["images"].values())
        spacing = "x".join(f"{value:.2f}" for value in data["spacing_mm"])
        line = f"{data['modality']}\t{images}\t{data['objects']}\t{spacing}"
        assert line in plain, data
        assert f"{data['pool']} {data['dataset']} {data['name']}" in plain


def test_means_of_tables_2_and_3_are_those_of_their_cells() -> None:
    paper = load_paper()
    assert len(paper.table3) == 20
    for row in paper.table3:
        for values in row.values.values():
            mean = np.mean([values[name] for name in paper.datasets])
            assert values["mean"] == pytest.approx(mean, abs=0.0051)
    checked = 0
    for each in paper.table2:
        cells = [value for value in each.map if value is not None]
        if each.map_mean is not None:
            assert each.map_mean == pytest.approx(np.mean(cells), abs=0.0051)
            checked += 1
    assert checked == 9


def test_mean_ranks_of_table_2_are_those_of_its_cells() -> None:
    rows = [row for row in load_paper().table2 if row.architecture == "retunet"]
    ranks = mean_ranks(np.array([row.map for row in rows], dtype=np.float64))
    assert ranks.tolist() == [row.map_mean_rank for row in rows] == [3.5, 3.25, 2.0, 1.25]


def test_the_papers_own_inconsistencies() -> None:
    assert inconsistencies(load_paper()) == INCONSISTENCIES
