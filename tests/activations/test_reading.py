"""Reading the residual stream: equal to Hugging Face's, whatever the batch and the padding."""

import itertools

import datasets
import pytest
import torch
from toys import CONTEXT, TEXTS

from xmodel_steer.activations.reading import capture
from xmodel_steer.core.errors import NonFiniteError, PromptError, PromptWarning, SiteError
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.core.spaces import Site
from xmodel_steer.models.recorder import recording
from xmodel_steer.models.sites import all_sites

CLOSE = dict(rtol=1e-4, atol=2e-4)
CHATS = [
    [{"role": "user", "content": "Call me Ishmael."}],
    [
        {"role": "system", "content": "In a hole"},
        {"role": "user", "content": "the clocks"},
        {"role": "assistant", "content": "were"},
    ],
]


def everything(toy, **kwargs):
    return capture(toy.model, TEXTS, all_sites(toy.model), tokens="all", include_special=True, **kwargs)


def test_equals_an_unpadded_pass_of_the_untouched_model(toy):
    made = everything(toy, batch_size=3)
    references = [toy.reference(toy.ids(text))[0] for text in TEXTS]
    for layer in range(toy.depth):
        torch.testing.assert_close(made[Site(layer)].values, torch.cat([r[layer] for r in references]), **CLOSE)


def test_equals_output_hidden_states_but_for_the_last_layer_which_is_before_the_final_norm(bridge):
    made = everything(bridge, batch_size=7)
    with torch.no_grad():
        states = [
            bridge.hf(torch.tensor([bridge.ids(text)]), output_hidden_states=True).hidden_states for text in TEXTS
        ]
    for layer in range(bridge.depth):
        theirs = torch.cat([s[layer + 1][0] for s in states])
        same = torch.allclose(made[Site(layer)].values, theirs, **CLOSE)
        assert same == (layer < bridge.depth - 1), layer


@pytest.mark.parametrize("tokens", ["last", "mean", "all", (2, 9)], ids=str)
def test_batch_size_and_padding_side_change_nothing(toy, tokens):
    sites = [Site(0), Site(toy.depth - 1)]
    one, *others = [
        capture(toy.model, TEXTS, sites, tokens=tokens, batch_size=size, padding_side=side)
        for size, side in itertools.product((1, 7), ("right", "left"))
    ]
    for other, site in itertools.product(others, sites):
        torch.testing.assert_close(other[site].values, one[site].values, **CLOSE)
        assert other[site].rows == one[site].rows


def test_what_tokens_selects(toy):
    """By the tokenizer's own offsets; specials and text position 0 are left out."""
    site, special = Site(1), set(toy.tokenizer.all_special_ids)
    want = {"last": [], "mean": [], "all": [], (2, 9): []}
    ends = {name: [] for name in want}
    for text in TEXTS:
        coded = toy.tokenizer(text, return_offsets_mapping=True)
        rows = toy.reference(coded["input_ids"])[0][1]
        end = [-1 if i in special else e for i, (_, e) in zip(coded["input_ids"], coded["offset_mapping"], strict=True)]
        content = [i for i, e in enumerate(end) if e >= 0 and i > 0]
        span = [i for i, e in enumerate(end) if 2 < e <= 9]
        for name, chosen in (("last", [len(rows) - 1]), ("all", content), ((2, 9), span)):
            want[name].append(rows[chosen])
            ends[name] += [end[i] for i in chosen]
        want["mean"].append(rows[content].mean(0, keepdim=True))
        ends["mean"].append(end[content[-1]])
    for tokens, rows in want.items():
        made = capture(toy.model, TEXTS, [site], tokens=tokens, batch_size=7)[site]
        torch.testing.assert_close(made.values, torch.cat(rows), **CLOSE)
        assert [e for _, e in made.rows] == ends[tokens]


def test_template_tokens_are_not_content(llama):
    tokenizer, site = llama.tokenizer, Site(2)
    for chat in CHATS:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=chat[-1]["role"] != "assistant"
        )
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        rows, inside, start = llama.reference(coded["input_ids"])[0][2], [], 0
        for message in chat:
            start = text.index(message["content"], start)
            stop = start + len(message["content"])
            inside += [i for i, (_, e) in enumerate(coded["offset_mapping"]) if start < e <= stop]
        for tokens, expected in {"all": rows[inside], "mean": rows[inside].mean(0)[None], "last": rows[-1:]}.items():
            made = capture(llama.model, [chat], [site], tokens=tokens)[site]
            torch.testing.assert_close(made.values, expected, **CLOSE)


def test_many_sites_in_one_pass_equal_one_at_a_time(toy):
    sites = [Site(toy.depth - 1), Site(0), Site(1, "resid_pre")]
    together = capture(toy.model, TEXTS, sites)
    assert list(together) == sites
    for site in sites:
        assert torch.equal(together[site].values, capture(toy.model, TEXTS, [site])[site].values)
        assert together[site].space.site == site and together[site].space.model == toy.name
    torch.testing.assert_close(together[Site(1, "resid_pre")].values, together[Site(0)].values)


def test_order_of_the_prompts_is_kept(toy):
    prompts = [Prompt(text=text, id=f"p{i}") for i, text in enumerate(TEXTS)]
    site = Site(0)
    forth = capture(toy.model, prompts, [site], batch_size=3)[site]
    back = capture(toy.model, prompts[::-1], [site], batch_size=3)[site]
    assert [i for i, _ in forth.rows] == [p.id for p in prompts]
    torch.testing.assert_close(back.values.flip(0), forth.values, **CLOSE)
    assert len({tuple(row) for row in forth.values.tolist()}) == len(TEXTS)


def test_stops_at_the_deepest_site_and_computes_no_logits(toy):
    ran, logits = [], []
    handles = [
        block.attn.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(toy.model.blocks)
    ]
    handles.append(toy.model.unembed.register_forward_hook(lambda _, __, out: logits.append(out.shape)))
    try:
        for deepest in range(toy.depth):
            ran.clear(), logits.clear()
            capture(toy.model, TEXTS[:3], [Site(0), Site(deepest)], batch_size=3)
            assert ran == list(range(deepest + 1))
            # Nothing stops a bridge after its last block: there one position's logits are made.
            assert not logits or (deepest == toy.depth - 1 and logits[0][1] == 1)
    finally:
        for handle in handles:
            handle.remove()


def test_leaves_no_hook_behind_and_values_that_later_passes_cannot_change(toy):
    before = capture(toy.model, TEXTS[:2], [Site(1)])[Site(1)].values
    kept = before.clone()
    capture(toy.model, TEXTS[2:4], [Site(1)])
    assert torch.equal(before, kept)
    assert not before.requires_grad


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(prompts=[]), PromptError, "no prompts were given"),
        (dict(prompts="one string"), PromptError, r"for a single one, \[prompt\]"),
        (dict(prompts=["a " * CONTEXT * 2]), PromptError, rf"reads at most {CONTEXT}; .*not cut silently"),
        (dict(prompts=["   "]), PromptError, "the text is empty"),
        (dict(sites=[]), ValueError, "at least one site"),
        (dict(sites=[Site(99)]), SiteError, r"has layers 0 to \d+, no resid_post\[99\]"),
        (dict(tokens=(-4, -1)), ValueError, r"must be \(start, end\) with 0 <= start < end, got \(-4, -1\)"),
        (dict(tokens=(7, 7)), ValueError, r"0 <= start < end, got \(7, 7\)"),
        (dict(tokens=(500, 600)), PromptError, "has no token that ends within characters 500 to 600"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(padding_side="both"), ValueError, "padding_side must be 'left' or 'right'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refuses(toy, arguments, error, says):
    given = dict(prompts=TEXTS, sites=[Site(0)]) | arguments
    with pytest.raises(error, match=says):
        capture(toy.model, given.pop("prompts"), given.pop("sites"), **given)


def test_a_long_prompt_is_cut_only_when_asked(toy):
    long = "the sky above the port " * CONTEXT
    made = capture(toy.model, [long], [Site(1)], tokens="all", include_special=True, max_tokens=9)[Site(1)]
    torch.testing.assert_close(made.values, toy.reference(toy.ids(long)[:9])[0][1], **CLOSE)


def test_a_prompt_of_specials_only_has_no_content(gemma):
    with pytest.raises(PromptError, match="no token other than special ones and text position 0"):
        capture(gemma.model, ["<bos>"], [Site(0)], tokens="all")


def test_a_site_that_does_not_fire_is_refused(toy):
    says = rf"{toy.name}: the hook point of resid_post\[1\] did not fire"
    with pytest.raises(SiteError, match=says), recording(toy.model, [Site(1)]):
        pass


def test_nan_is_refused_by_name(toy):
    weight = [p for p in toy.model.blocks[1].parameters() if p.ndim > 1][-1]  # attention's may be masked
    good = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        assert capture(toy.model, TEXTS, [Site(0)])
        with pytest.raises(
            NonFiniteError, match=rf"capture {toy.name} resid_post\[1\] \(torch.float32\): NaN or infinity in 8 row"
        ):
            capture(toy.model, TEXTS, [Site(0), Site(1)])
    finally:
        with torch.no_grad():
            weight.copy_(good)


STRIPS = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] | trim }}[/]{% endfor %}"


def test_reasoning_that_the_template_strips_changes_no_activation_of_the_content(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", STRIPS)
    talks = [
        [
            {"role": "user", "content": "Call me"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": "the sky"},
        ]
        for said in ("Yes.", "<think>\nHm.\n</think>\n\nYes.")
    ]
    for tokens in ("last", "mean", "all"):
        one = capture(llama.model, talks[:1], [Site(1)], tokens=tokens)[Site(1)]
        with pytest.warns(PromptWarning, match=r"the chat template of llama leaves out .* message 2 \(assistant\);"):
            two = capture(llama.model, talks[1:], [Site(1)], tokens=tokens)[Site(1)]
        assert torch.equal(one.values, two.values)


def test_prompts_of_every_kind_or_an_error_that_names_what_came(llama):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    one, two = (capture(llama.model, prompts, [Site(1)])[Site(1)] for prompts in (TEXTS, rows))
    assert torch.equal(one.values, two.values) and one.rows == two.rows
    with pytest.raises(PromptError, match=r"DatasetDict with splits train; give one of them, data\['train'\]"):
        capture(llama.model, datasets.DatasetDict(train=rows), [Site(1)])
    with pytest.raises(PromptError, match=r"columns \['sentence'\]; rename one"):
        capture(llama.model, rows.rename_column("text", "sentence"), [Site(1)])
