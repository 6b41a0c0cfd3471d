"""In a notebook a record is a small table."""

import torch
import toys
from sample_layers import collected, rows
from sample_results import moments, vector

import xmodel_steer as xs
from xmodel_steer.core.tables import html_table


def records() -> dict[str, tuple[object, tuple[str, ...]]]:
    pair, joy = moments().pair(xs.Site(1), xs.Site(2, "resid_mid")), vector()
    trained = xs.Autoencoder(hidden=4, epochs=1).fit(rows())
    labelled = tuple((f"p{i // 2}", i) for i in range(5))
    return {
        "Activations": (xs.Activations(torch.ones(5, 4), joy.space, labelled), (str(joy.space), "5", "3", "float32")),
        "SteeringVector": (joy, ("joy", str(joy.space), "3 positive, 5 negative", f"{joy.norm():.4g}")),
        "ContrastSet": (toys.contrast(), ("20, such as", "yes")),
        "Moments": (moments(), (str(joy.space), "120", "12", "91%")),
        "AffineMap": (xs.Ridge().fit(pair), (str(pair.source), str(pair.target), "Ridge", "penalty", "held-out R²")),
        "AutoencoderMap": (trained, (str(trained.source), str(trained.target), "Autoencoder")),
        "LayerGrid": (xs.maps.layer_grid(collected()), ("small, 3 sites", "large, 2 sites", "test R²")),
        "DataCurve": (xs.maps.data_curve(rows(), tokens=[20, 144]), (str(rows().source), "R² of Ridge", "more text")),
    }


def test_a_record_is_a_short_table() -> None:
    for name, (record, parts) in records().items():
        html = record._repr_html_()  # type: ignore[attr-defined]
        assert html.startswith(f"<table><caption>{name}</caption>") and html.endswith("</table>")
        for part in parts:
            assert part in html, (part, html)
        assert 2 <= html.count("<tr>") <= 7 and len(html) < 1200, html
        assert "tensor(" not in html


def test_html_in_names_and_values_is_escaped_and_empty_rows_are_left_out() -> None:
    html = html_table("<i>", {"<b>": "a & <b>bold</b>", "empty": ""})
    assert "<b>" not in html and "<i>" not in html and "empty" not in html
    assert "a &amp; &lt;b&gt;bold&lt;/b&gt;" in html
    assert "<b>" not in xs.SteeringVector(torch.ones(4), vector().space, "<b>joy</b>")._repr_html_()
    contrast = xs.ContrastSet.from_prompts(["<b>" * 500], ["plain"])
    assert "<b>" not in contrast._repr_html_() and len(contrast._repr_html_()) < 1500
