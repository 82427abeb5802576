"""What each look found, drawn: one function a view, given the look's result."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import streamlit as st

from gptcore.explain.packed import unpack
from gptcore.explain.profile import BETWEEN, IDLE
from gptcore.passes.drop_layers import DropLayers
from gptcore.records import Run
from pages.parts import errors, explain_charts, explain_state, links, optimize_state
from pages.parts import format as shown
from pages.parts.explain_looks import chart, coloured, halves

Result = Mapping[str, Any]
CHARACTERS = {
    "first": "First token",
    "previous": "Token before",
    "itself": "Itself",
    "distance": "Tokens back",
    "entropy_bits": "Entropy, bits",
}
LENSES = {
    "final_probability": ("Final word", "%"),
    "entropy_bits": ("Entropy", "bits"),
    "kl_nats": ("Distance to the end", "nats"),
}


def _look_again(**changes: Any) -> None:
    """Change what is looked at, and look."""
    errors.redraw()
    if explain_state.change(**changes):
        explain_state.look()


def _again_from(key: str, name: str) -> None:
    """Take a value from its widget, and look again."""
    _look_again(**{name: st.session_state[key]})


# Attention


def attention(result: Result, run: Run) -> None:
    """Draw one head's map, every head small, and the formula with its real numbers."""
    texts = result["text"]["texts"]
    layer, head = result["layer"], result["head"]
    weights = unpack(result["weights"])
    small = unpack(result["small"])
    with st.container(border=True):
        st.markdown("**Every head** at a glance; click one to look at it")
        key = f"heads {run.id}"
        notes = [_character(one) for one in result["characters"]]
        chart(
            explain_charts.all_heads(small, result["heads"], notes, layer, head),
            key=key,
            on_select=partial(_take_clicked, key),
            selection_mode="points",
        )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        for name, most in (("layer", len(result["heads"])), ("head", result["heads"][layer])):
            key = f"{name} of {run.id}"
            st.number_input(
                name.capitalize(),
                min_value=0,
                max_value=most - 1,
                value=result[name],
                key=key,
                on_change=_again_from,
                args=(key, name),
                width=130,
            )
        query = st.selectbox(
            "Token that looks",
            range(len(texts)),
            index=len(texts) - 1,
            format_func=lambda at: f"{at}: {_plain(texts[at])}",
            key=f"query {run.id}",
        )
        st.selectbox(
            "Heads of note",
            [None, *_of_note(result["characters"])],
            format_func=lambda one: "choose…" if one is None else one[2],
            key=f"note {run.id}",
            on_change=_take_note,
            args=(f"note {run.id}",),
            help="The head of each kind that shows it most on this text.",
        )
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown(f"**Layer {layer}, head {head}**: what each token looks at")
        chart(explain_charts.attention_map(weights, texts, query), key=f"map {run.id}")
    with right, st.container(border=True, height="stretch"):
        st.latex(r"\mathrm{softmax}\left(\frac{QK^\top}{\sqrt{d}}\right)V")
        _formula(result, weights, query)
    with st.container(border=True):
        st.markdown(f"**Q, K and V** of this head, {len(texts)} tokens × {result['head_width']}")
        chart(
            explain_charts.vectors(
                {name: unpack(result[name.lower()]) for name in ("Q", "K", "V")}, texts
            ),
            key=f"qkv {run.id}",
        )
        how = (
            "The model computes attention in one fused operation, which never holds the weights as "
            "a whole: Q, K and V were caught on their way into it, and the weights computed again "
            "from them in fp32."
            if result["fused"]
            else "A pass replaced the fused operation, so Q, K and V were computed again from the "
            "projections, and the weights from them in fp32."
        )
        st.caption(
            shown.escaped(
                f"{how} Over all heads, weights · V differs from what the model computed by at "
                f"most {result['disagreement']:.1e} of a layer's largest value. Rows sum to 1 "
                f"within {np.abs(weights.sum(-1) - 1).max():.0e}."
            )
        )


def _take_clicked(key: str) -> None:
    """Look at the head that was clicked; told once a click, so that a drawing begins nothing."""
    if points := st.session_state[key]["selection"]["points"]:
        layer, head = (int(part) for part in points[0]["customdata"])
        _look_again(layer=layer, head=head)


def _formula(result: Result, weights: np.ndarray, query: int) -> None:
    """Draw the numbers of one row of the formula, the most looked-at tokens first."""
    texts, width = result["text"]["texts"], result["head_width"]
    q, k, v = (unpack(result[name]) for name in "qkv")
    dots = k[: query + 1] @ q[query]
    order = np.argsort(-weights[query, : query + 1], kind="stable")[:10]
    st.dataframe(
        {
            "Token": [f"{at}: {_plain(texts[at])}" for at in order],
            "q · k": [f"{dots[at]:.3f}" for at in order],
            f"÷ √{width}": [f"{dots[at] / width**0.5:.3f}" for at in order],
            "softmax": [f"{weights[query, at]:.4f}" for at in order],
        },
        hide_index=True,
        column_config={
            name: st.column_config.TextColumn(name, alignment="right")
            for name in ("q · k", f"÷ √{width}", "softmax")
        },
        alt="Scores and weights of the tokens that are looked at most",
    )
    again, own = weights[query] @ v, unpack(result["output"])[query]
    shown_left = ", ".join(f"{one:.3f}" for one in again[:4])
    shown_right = ", ".join(f"{one:.3f}" for one in own[:4])
    st.caption(
        shown.escaped(
            f"“{_plain(texts[query])}” looks. Weights · V begins {shown_left}, …; the model's own "
            f"attention gave {shown_right}, … The numbers are kept with three digits."
        )
    )


def _take_note(key: str) -> None:
    if (chosen := st.session_state[key]) is not None:
        _look_again(layer=chosen[0], head=chosen[1])


def _of_note(characters: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """Return the heads that show a kind of attention most: layer, head, and its name."""
    kinds: tuple[tuple[str, str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("looks at the token before", "previous", lambda one: one["previous"]),
        ("looks at itself", "itself", lambda one: one["itself"]),
        ("rests on the first token", "first", lambda one: one["first"]),
        ("looks furthest back", "distance", lambda one: one["distance"] * (1 - one["first"])),
        ("spreads most evenly", "entropy_bits", lambda one: one["entropy_bits"]),
    )
    found = []
    for name, field, measure in kinds:
        one = max(characters, key=measure)
        value = (
            f"{one[field]:.1f}"
            if field in ("distance", "entropy_bits")
            else shown.share(one[field])
        )
        unit = {"distance": " tokens", "entropy_bits": " bits"}.get(field, "")
        found.append(
            (one["layer"], one["head"], f"{one['layer']}.{one['head']} {name} ({value}{unit})")
        )
    return found


def _character(one: Mapping[str, Any]) -> str:
    return (
        f"first token {shown.share(one['first'])}, token before {shown.share(one['previous'])}, "
        f"itself {shown.share(one['itself'])}<br>{one['distance']:.1f} tokens back on average, "
        f"entropy {one['entropy_bits']:.1f} bits"
    )


# Lens


def lens(result: Result, run: Run) -> None:
    """Draw what the model would say if it stopped after each layer."""
    texts = result["text"]["texts"]
    ids, p = unpack(result["ids"]), unpack(result["probabilities"])
    words = [
        [
            [(result["words"][str(id)], share) for id, share in zip(cell, shares, strict=True)]
            for cell, shares in zip(row, row_shares, strict=True)
        ]
        for row, row_shares in zip(ids.tolist(), p.tolist(), strict=True)
    ]
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**If it stopped after each layer**, it would say", width="stretch")
            value = st.segmented_control(
                "Colour",
                list(LENSES),
                default="final_probability",
                required=True,
                format_func=lambda name: LENSES[name][0],
                key=f"lens of {run.id}",
                label_visibility="collapsed",
            )
        unit = LENSES[value][1]
        table = unpack(result[value]) * (100 if unit == "%" else 1)
        chart(explain_charts.lens_map(table, words, texts, unit), key=f"lens {run.id} {value}")
        st.caption(
            "Colour: the probability of what the whole model says in the end, the entropy, or the "
            "divergence from the end. Each word is the likeliest next token after the one above "
            "its column. Early layers never learned to be read this way."
        )
    with st.container(border=True):
        st.markdown(
            f"**How it decides** what follows “{shown.escaped(_plain(texts[-1]))}”: "
            f"{shown.escaped(_plain(words[-1][-1][0][0]))}, {shown.share(words[-1][-1][0][1])}"
        )
        chart(
            explain_charts.decision(
                unpack(result["final_probability"])[:, -1], unpack(result["entropy_bits"])[:, -1]
            ),
            key=f"decision {run.id}",
        )
        final = ids[-1, -1, 0]
        ahead = next(depth for depth in range(len(ids)) if (ids[depth:, -1, 0] == final).all())
        st.caption(
            f"It is the likeliest from {ahead} of {len(ids) - 1} layers on. The last row is the "
            "model's own output, exactly."
        )


# Attribution


def attribution(result: Result, run: Run) -> None:
    """Draw what each token speaks for, by two methods, and how faithful each is."""
    texts = result["text"]["texts"]
    methods = result["methods"]
    leads = result.get("leads", next(iter(methods), None))
    offered = {one["id"]: one for one in result["candidates"]}
    key = f"target of {run.id}"
    with st.container(horizontal=True, vertical_alignment="bottom"):
        target = result["target"]
        names = [*offered] if target["id"] in offered else [target["id"], *offered]
        st.selectbox(
            "What is explained: the probability of",
            names,
            index=names.index(target["id"]),
            format_func=lambda id: (
                f"{_plain(offered[id]['text'])} · {shown.share(offered[id]['probability'])}"
                if id in offered
                else _plain(target["text"])
            ),
            key=key,
            on_change=_again_from,
            args=(key, "target_id"),
            width=280,
        )
        steps = f"steps of {run.id}"
        st.select_slider(
            "Points of the gradients' line",
            (16, 32, 64, 128, 256),
            value=min((16, 32, 64, 128, 256), key=lambda n: abs(n - run.settings["steps"])),
            key=steps,
            on_change=_again_from,
            args=(steps, "steps"),
            width=280,
        )
    if result["gradients_problem"]:
        errors.show(result["gradients_problem"], icon=":material/info:")
    if not methods:
        return
    with st.container(border=True):
        st.markdown(f"**{explain_charts.METHODS[leads]}** leads")
        scores = methods[leads]["scores"]
        coloured(
            texts,
            scores,
            [
                f"{_plain(text)}: {score:+.3f} nats"
                for text, score in zip(texts, scores, strict=True)
            ],
        )
        st.caption(
            f"Blue speaks for “{shown.escaped(_plain(result['target']['text']))}”, red against it. "
            "Hover a word for its score."
        )
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**Score of each token**")
        chart(explain_charts.scores(methods, texts), key=f"scores {run.id}")
        if "gradients" in methods:
            _completeness(methods["gradients"])
    with right, st.container(border=True, height="stretch"):
        st.markdown("**Is that so? Take the tokens out**")
        if "removed" not in result:
            st.caption("Not computed yet.")
            return
        chart(explain_charts.deletions(result), key=f"deletion {run.id}")
        chance = result["random_mean"]
        parts = [
            f"{explain_charts.METHODS[name]} {shown.share(one['deletion_mean'])}"
            for name, one in methods.items()
        ]
        st.caption(
            shown.escaped(
                f"Mean probability over the curve: {'; '.join(parts)}; random orders "
                f"{shown.share(chance)}. A method that found what matters lets it fall sooner."
            )
        )


def _completeness(found: Mapping[str, Any]) -> None:
    error = found["completeness_error"]
    if found["reliable"]:
        st.badge(f"Completeness error {shown.share(error)}", icon=":material/check:", color="green")
    else:
        st.badge(
            f"Unreliable: completeness error {shown.share(error)}",
            icon=":material/warning:",
            color="orange",
        )
    st.caption(
        shown.escaped(
            f"The scores add up to {sum(found['scores']):+.2f} nats and should to "
            f"{found['difference']:+.2f}, over {found['steps']} points from the mean embedding. "
            "Above 5 % they are called unreliable, which is the rule on deep models; then leaving "
            "tokens out leads."
        )
    )


# Heads and layers switched off


def worth(result: Result, run: Run) -> None:
    """Draw what heads and layers are worth on the text."""
    parts, layers = result.get("parts", []), result["layers"]
    heads = [one for one in parts if one["part"] == "head"]
    if not heads:
        return
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**Heads switched off**, one at a time", width="stretch")
            value = st.segmented_control(
                "Value",
                ("kl_nats", "loss_change"),
                default="kl_nats",
                required=True,
                format_func={
                    "kl_nats": "How far predictions move",
                    "loss_change": "Change of the loss",
                }.__getitem__,
                key=f"worth of {run.id}",
                label_visibility="collapsed",
            )
        chart(explain_charts.worth_map(parts, layers, value), key=f"worth {run.id} {value}")
    left, right = halves()
    with left, st.container(border=True, height="stretch"):
        st.markdown("**Layers switched off**")
        chart(explain_charts.layer_bars(parts, layers), key=f"layers {run.id}")
    with right, st.container(border=True, height="stretch"):
        st.markdown("**Ranking for pruning**, what is missed least first")
        ranked = sorted(heads, key=lambda one: one["kl_nats"])
        st.dataframe(
            {
                "Layer": [one["layer"] for one in ranked],
                "Head": [one["head"] for one in ranked],
                "Moves predictions, nats": [f"{one['kl_nats']:.5f}" for one in ranked],
                "Loss, nats": [
                    f"{one['loss_change']:+.4f} ± {one['standard_error']:.4f}" for one in ranked
                ],
            },
            hide_index=True,
            height=260,
            column_config={
                name: st.column_config.TextColumn(name, alignment="right")
                for name in ("Moves predictions, nats", "Loss, nats")
            },
            alt="Heads, the least missed first",
        )
        _dropping(parts, layers, run)
    if "loss" in result:
        clear = sum(one["loss_change"] > 2 * one["standard_error"] for one in heads)
        st.caption(
            shown.escaped(
                f"Loss of the whole model {result['loss']:.3f} nats a token over "
                f"{len(result['text']['ids']) - 1} tokens. Without {clear} of {len(heads)} heads "
                "it is clearly worse (above two standard errors). On so short a text the change of "
                "the loss is much chance, so the ranking goes by how far the predictions move: KL "
                "of the whole model from the one without the head."
            )
        )


def _dropping(parts: list[Mapping[str, Any]], layers: int, run: Run) -> None:
    """Offer a recipe that drops the layers that are missed least."""
    ranked = sorted(
        (one for one in parts if one["part"] == "block"), key=lambda one: one["kl_nats"]
    )
    if len(ranked) < layers or layers < 2:
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        count = st.number_input(
            "Layers to drop, the least missed first",
            1,
            layers - 1,
            key=f"drop of {run.id}",
            width=260,
        )
        chosen = tuple(sorted(one["layer"] for one in ranked[: int(count)]))
        if st.button(
            "Optimize with it",
            icon=":material/tune:",
            help="Puts the recipe into the page Optimize, which makes the model and proves it.",
        ):
            optimize_state.change_recipe([DropLayers(chosen=chosen)])
            st.switch_page(links.OPTIMIZE)
    listed = ", ".join(map(str, chosen))
    st.code(
        json.dumps([{"pass": DropLayers.name, "chosen": chosen}]), language="json", wrap_lines=True
    )
    st.caption(f"Drops layer{'s' * (len(chosen) > 1)} {listed}; for `--recipe` and Python too.")


# Difference


def difference(result: Result, run: Run) -> None:
    """Draw where two variants part."""
    texts = result["text"]["texts"]
    kl = result["kl_nats"]
    first = result["first_divergence"]
    with st.grid(4, min_column_width=180, gap="small"):
        st.metric(
            "Same likeliest token",
            shown.share(result["same_top_ratio"]),
            delta=f"of {len(texts)} positions",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
        )
        st.metric(
            "Divergence, mean",
            f"{shown.number(float(np.mean(kl)))} nats",
            delta=f"at most {shown.number(max(kl))}",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="KL(A ‖ B) of the next token, over the positions of the text.",
        )
        st.metric(
            "First divergence",
            "none" if first is None else f"token {first}",
            delta="both say the same" if first is None else
            f"“{_plain(result['a'][first])}” or “{_plain(result['b'][first])}”",
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="The first position after which the two find another token likeliest.",
        )  # fmt: skip
        a, b = (np.log(np.maximum(one, 1e-30)) for one in result["true_probabilities"])
        st.metric(
            "Loss, B against A",
            f"{float(np.mean(a - b)):+.4f} nats",
            delta=f"± {shown.number(float(np.std(a - b, ddof=1) / len(a) ** 0.5))}"
            if len(a) > 1 else None,
            delta_color="off",
            delta_arrow="off",
            border=True,
            height="stretch",
            help="Mean over the text's tokens, with its standard error, paired by token.",
        )  # fmt: skip
    with st.container(border=True):
        st.markdown("**Where in the network** B parts from A")
        if result["layers"]:
            chart(explain_charts.layer_errors(result["layers"]), key=f"errors {run.id}")
            worst = max(result["layers"][1:], key=lambda one: one["introduced"])
            st.caption(
                shown.escaped(
                    f"|B − A| ÷ |A| of the residual stream. Layer {worst['blocks']} introduces "
                    f"most by itself, {shown.share(worst['introduced'])}, when it is given A's "
                    "stream. After the last layer the streams' cosine is "
                    f"{result['layers'][-1]['cosine']:.5f}."
                )
            )
        else:
            st.caption(
                "The two have not the same layers, so no layer of one answers a layer of the "
                "other; their predictions are compared below."
            )
    with st.container(border=True):
        st.markdown("**Token by token**")
        chart(explain_charts.divergences(result, texts), key=f"kl {run.id}")
        st.caption("Red where the two would go on with another token.")


# Profile


def profile(result: Result, run: Run) -> None:
    """Draw where the time of a decode step goes."""
    step_s, named = result["step_s"], result["named"]
    rows = result["operations"]
    plain_s = float(np.median(result["plain_s"]))
    native = result.get("native_s")
    covered = sum(one["seconds"] for one in rows[:named]) / step_s
    between = next(one for one in rows if one["name"] in (BETWEEN, IDLE))
    with st.grid(4, min_column_width=180, gap="small"):
        for name, value, delta, said in (
            (
                "Decode step",
                shown.duration(float(np.median(native))) if native else shown.duration(plain_s),
                f"native; torch {shown.duration(plain_s)}"
                if native
                else f"median of {len(result['plain_s'])}",
                "Without the profiler. The native step is one call, which no profiler looks into; "
                "the parts below are those of torch's way through the same layers."
                if native
                else "Without the profiler.",
            ),
            (
                "Under the profiler",
                shown.duration(step_s),
                f"{step_s / plain_s:.2f} × as long",
                "The profiler slows each operation down; the shares below are of this time.",
            ),
            (
                "Operations that cover it",
                str(named),
                f"{shown.share(covered)} of the step",
                "So many of the longest, drawn in blue, make up nine tenths of the step.",
            ),
            (
                "Between operations" if between["name"] == BETWEEN else "No kernel running",
                shown.share(between["seconds"] / step_s),
                shown.duration(between["seconds"]),
                "Python and the dispatch of operations; on a GPU, the time in which no kernel ran.",
            ),
        ):
            st.metric(
                name,
                value,
                delta=delta,
                delta_color="off",
                delta_arrow="off",
                border=True,
                height="stretch",
                help=said,
            )
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown("**Operations of one step** by the time they take", width="stretch")
            st.download_button(
                "Trace",
                lambda: gzip.decompress(base64.b64decode(result["trace"])),
                f"decode-{run.id}.json",
                "application/json",
                icon=":material/download:",
                help="Chrome's trace format: open it at ui.perfetto.dev or chrome://tracing.",
            )
        chart(explain_charts.operations(rows, step_s, named), key=f"profile {run.id}")
        st.caption(
            "The time that each kind of operation spends itself, without those that it calls, so "
            f"the parts add up to the step. {len(result['text']['ids'])} tokens were known before."
        )


VIEWS: dict[str, Callable[[Result, Run], None]] = {
    "Attention": attention,
    "Lens": lens,
    "Attribution": attribution,
    "Heads": worth,
    "Difference": difference,
    "Profile": profile,
}


def _plain(text: str) -> str:
    """Return a token in one short line, white space seen."""
    seen = text.translate(explain_charts.MARKS)
    seen = seen[1:] if len(seen) > 1 and seen[0] == "␣" else seen
    return shown.one_line(seen, 24) or "∅"
