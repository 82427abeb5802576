"""The proof card: what a recipe changed on every axis, and how each number was found."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import streamlit as st

from pages.parts import format as shown
from pages.parts import proof_charts
from pages.parts.compare_charts import cell_name

COLOURED_NATS, RED_NATS = 0.05, 0.5
"""KL of a token from which on it is coloured, and at which it is red."""
HELP = {
    "Decode": "How many times as fast new tokens come, one sequence at a time: median of the "
    "paired blocks of both sides, measured in turn.",
    "Prefill": "How many times as fast a prompt is read.",
    "Response": "Prefill and decode together: time of the variant ÷ time of the baseline.",
    "On disk": "Bytes that a file keeps, embedding included: variant ÷ baseline.",
    "In memory": "Bytes that the weights take once loaded: variant ÷ baseline.",
    "Energy": "Joules of one repetition of the same work: variant ÷ baseline.",
    "KL": "Mean KL divergence of the variant's predictions from the baseline's on the evaluation "
    "text, in nats a token: 0 is the same model.",
    "Perplexity": "exp of the mean difference of negative log-likelihoods: 1 is as good.",
    "Same top": "Share of positions at which both find the same token likeliest.",
    "Tasks": "Items answered rightly of those that ship, baseline → variant.",
}


def draw(card: Mapping[str, Any], *, final: bool, key: str) -> None:
    """Draw a card as far as it is known.

    Args:
        card: ``Card.as_json``.
        final: whether nothing more will be known.
        key: unique in the page.
    """
    a, b = card["sides"]
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(
                f"**{shown.escaped(b['model'])}** {b['precision']} · {shown.escaped(b['recipe'])} "
                f":gray[against {shown.escaped(a['model'])} {a['precision']}, {a['threads']} "
                "threads]",
                width="stretch",
            )
            _badge(card, final)
        if card.get("void"):
            st.warning(shown.escaped(card["void"]), icon=":material/block:")
        for problem in card["problems"]:
            st.error(shown.escaped(problem), icon=":material/error:")
        if nothing_converted(card):
            st.error(
                "Nothing was converted: "
                + shown.escaped("; ".join(sorted({why for _, why in skipped(card)}))),
                icon=":material/block:",
            )
        _numbers(card)
        goals(card)
        if even := card.get("break_even"):
            st.caption(break_even(even))
    st.plotly_chart(proof_charts.axes(card), key=f"{key}_axes", config={"displayModeBar": False})
    st.caption(
        "Circles are measured, with 95 % intervals; diamonds are counted. Colour only where the "
        "verdict claims a difference above this machine's noise."
    )
    _details(card, key)


def _badge(card: Mapping[str, Any], final: bool) -> None:
    if not final:
        st.badge("Measuring", icon=":material/hourglass_top:", color="blue")
    elif card["accepted"] is False:
        st.badge("Rejected: a goal is not met", icon=":material/close:", color="red")
    elif card["accepted"]:
        st.badge("Goals met", icon=":material/check:", color="green")
    elif card["complete"]:
        st.badge("Complete", icon=":material/check_circle:", color="gray")
    else:
        st.badge("Incomplete", icon=":material/hourglass_empty:", color="orange")


def _numbers(card: Mapping[str, Any]) -> None:
    first: dict[str, Mapping[str, Any]] = {}
    for one in card["axes"]:
        first.setdefault(one["title"], one)
    prefills = [one for one in card["axes"] if one["title"] == "Prefill" and one["ratio"]]
    if prefills:
        first["Prefill"] = max(prefills, key=lambda one: one["cell"]["prompt_tokens"])
    with st.grid("auto", min_column_width=120, gap="small"):
        for title in ("Decode", "Prefill"):
            if one := first.get(title):
                _speed(title, one)
        for title in ("Response", "On disk", "In memory", "Energy"):
            if one := first.get(title):
                _ratio(title, one)
        quality = card.get("quality", {})
        if "kl_mean" in quality:
            error = quality["kl_se"]
            _metric("KL", f"{quality['kl_mean']:.2g}", "" if error is None else f"± {error:.1g}")
            low, high = quality["perplexity_ratio_low"], quality["perplexity_ratio_high"]
            _metric(
                "Perplexity",
                f"× {quality['perplexity_ratio']:.3f}",
                "" if low is None else f"{low:.3f} to {high:.3f}",
            )
            _metric("Same top", shown.share(quality["same_top_ratio"]), "")
        if tasks := card.get("tasks"):
            was = tasks["overall"]["accuracy"]["ratio"]
            now = tasks["against"]["overall"]["accuracy"]["ratio"]
            _metric("Tasks", f"{now:.1%}", f"from {was:.1%}, {tasks['flips']['verdict']}")
    if note := quality.get("note"):
        st.caption(shown.escaped(note))
        a, b = quality["bits_per_byte"]
        st.caption(f"Bits per byte, each side alone: {a:.4f} → {b:.4f}.")


def _speed(title: str, one: Mapping[str, Any]) -> None:
    if one["ratio"] is None or one["verdict"] == "incomplete":
        _metric(title, shown.UNKNOWN, "measuring" if not one["reason"] else "incomplete")
        return
    low, high = 1 / one["high"], 1 / one["low"]
    word = one["verdict"] if one["verdict"] != "no detectable difference" else "no difference"
    _metric(title, f"{1 / one['ratio']:.2f} ×", f"{low:.2f} to {high:.2f}, {word}", one)


def _ratio(title: str, one: Mapping[str, Any]) -> None:
    if one["ratio"] is None or one["verdict"] == "incomplete":
        _metric(title, shown.UNKNOWN, "measuring")
        return
    if one["metric"].endswith("_bytes"):
        below = f"{shown.size(one['a'])} → {shown.size(one['b'])}"
    else:
        below = f"{one['low']:.2f} to {one['high']:.2f}"
        if one["label"]:
            below += f", {one['label'].partition(':')[0]}"
    _metric(title, f"× {one['ratio']:.3f}", below, one)


def _metric(title: str, value: str, below: str, one: Mapping[str, Any] | None = None) -> None:
    with st.container(gap=None):
        color = ""
        if one is not None and one["coloured"]:
            color = "green" if one["good"] else "red"
        st.metric(title, value, help=HELP.get(title))
        if below:
            st.caption(f":{color}[{shown.escaped(below)}]" if color else shown.escaped(below))


def goals(card: Mapping[str, Any]) -> None:
    """Draw each goal with what was measured."""
    for one in card["goals"]:
        icon = {True: ":green[:material/check:]", False: ":red[:material/close:]"}.get(
            one["met"], ":material/hourglass_empty:"
        )
        value = shown.UNKNOWN if one["measured"] is None else f"{one['measured']:.3g}"
        st.caption(f"{icon} Goal: {one['title'].lower()} {one['limit']:g}, measured {value}")


def break_even(even: Mapping[str, Any]) -> str:
    """Return after how many tokens the time of making is earned back."""
    made = shown.duration(even["one_time_s"])
    if even["tokens"] is None:
        return f"Making it took {made}; no time is saved a token, so that is never earned back."
    saved = shown.duration(even["saving_s_per_token"])
    return (
        f"Break-even: making it took {made} and saves {saved} a token, so it is earned back after "
        f"{even['tokens']:,.0f} tokens."
    )


def skipped(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (module, reason) of everything that passes left as it was."""
    return [(module, why) for one in card["coverage"].values() for module, why in one["skipped"]]


def nothing_converted(card: Mapping[str, Any]) -> bool:
    """Return whether some pass found nothing to convert."""
    return any(
        one["total_weights"] and not one["converted_weights"] for one in card["coverage"].values()
    )


def _details(card: Mapping[str, Any], key: str) -> None:
    how, why, quality, damage, weights = st.tabs(
        ["What was done", "Expected and measured", "Quality", "Damage map", "Weights"]
    )
    with how:
        _done(card)
    with why:
        _expected(card)
    with quality:
        _quality(card)
    with damage:
        _damage(card, key)
    with weights:
        _weights(card, key)


def _done(card: Mapping[str, Any]) -> None:
    for one in card["mechanisms"]:
        covered = card["coverage"].get(one["pass"])
        with st.container(border=True):
            st.markdown(f"**{one['title']}** · {shown.escaped(one['mechanism'])}")
            if covered and covered["total_weights"]:
                bits = covered["effective_bits"]
                said = f"{shown.share(covered['ratio'])} of the matrix weights converted"
                if bits:
                    said += f", {bits:.2f} bits a weight of these"
                st.caption(said)
            if one["caution"]:
                st.caption(f":orange[:material/warning:] {shown.escaped(one['caution'])}")
            if covered and covered["skipped"]:
                with st.expander(f"{len(covered['skipped'])} left as they were"):
                    st.dataframe(
                        [{"Module": module, "Why": why} for module, why in covered["skipped"]],
                        hide_index=True,
                    )
    sides = [
        {
            "Side": one["side"],
            "Model": one["model"],
            "Precision": one["precision"],
            "Recipe": one["recipe"],
            "Parameters": shown.whole(one["parameters"]),
            "On disk": shown.size(one["stored_bytes"]),
            "In memory": shown.size(one["resident_bytes"]),
            "A step reads": shown.size(one["step_bytes"]),
            "Weights came as": one["source_precision"],
            "Passes took": shown.duration(one["passes_s"]),
        }
        for one in card["sides"]
    ]
    st.dataframe(sides, hide_index=True)
    st.caption(f"{card['effective_bits']:.2f} stored bits for each parameter of the baseline.")
    if speed := card.get("speed"):
        st.caption(shown.escaped(f"{speed['method']} {speed['residency']}."))


def _expected(card: Mapping[str, Any]) -> None:
    rows = [
        {
            "Work": f"{one['target']} · {cell_name(one['cell'])}",
            "Expected B ÷ A": round(one["expected_ratio"], 3),
            "Measured B ÷ A": round(one["measured_ratio"], 3),
            "A at": shown.share(one["a_share"]),
            "B at": shown.share(one["b_share"]),
            "Why": one["rule"],
        }
        for one in card.get("expectations", ())
    ]
    if not rows:
        st.caption("Not measured yet.")
        return
    st.dataframe(rows, hide_index=True)
    st.caption(
        "Expected is a roofline from the peaks measured on this machine: the longer of operations "
        "÷ peak and bytes ÷ bandwidth. “At” is the share of that limit which each side reaches."
    )


def _quality(card: Mapping[str, Any]) -> None:
    quality = card.get("quality")
    if not quality or "kl_mean" not in quality:
        st.caption("Not measured yet." if not quality else "The two predict different tokens.")
        return
    a, b = quality["perplexity"]
    rows = [
        ("Perplexity", f"{a:.4f} → {b:.4f}"),
        ("Bits per byte", " → ".join(f"{one:.4f}" for one in quality["bits_per_byte"])),
        ("KL median", f"{quality['kl_median']:.2e} nats"),
        ("KL 99 %", f"{quality['kl_p99']:.3g} nats"),
        ("Probability of the true token", f"mean change {quality['delta_p_mean']:+.5f}"),
        ("", f"root mean square {quality['delta_p_rms']:.4f}"),
        ("Same likeliest token", shown.share(quality["same_top_ratio"])),
        ("Tokens scored", shown.whole(quality["scored_tokens"])),
    ]
    if greedy := quality.get("greedy"):
        first = [one for one in greedy["first_divergent"] if one is not None]
        rows.append(
            (
                "Greedy texts",
                f"{greedy['agreement_ratio']:.0%} of {greedy['new_tokens']} tokens agree before "
                f"the first that differs (at {', '.join(map(str, first)) or 'none'})",
            )
        )
    st.dataframe([{"Number": name, "Value": value} for name, value in rows], hide_index=True)
    if tasks := card.get("tasks"):
        st.dataframe(
            [
                {
                    "Tasks": was["kind"],
                    "Baseline": f"{was['accuracy']['ratio']:.0%}",
                    "Variant": f"{now['accuracy']['ratio']:.0%}",
                    "95 %": f"{now['accuracy']['low']:.0%} to {now['accuracy']['high']:.0%}",
                    "Chance": f"{was['chance_ratio']:.0%}",
                    "Items": was["accuracy"]["n"],
                }
                for was, now in zip(tasks["kinds"], tasks["against"]["kinds"], strict=True)
            ],
            hide_index=True,
        )


def _damage(card: Mapping[str, Any], key: str) -> None:
    found = card.get("damage")
    if not found:
        st.caption("Not measured.")
        return
    if found["note"]:
        st.caption(shown.escaped(found["note"]))
    if found["stream"]:
        st.plotly_chart(
            proof_charts.damage(found), key=f"{key}_damage", config={"displayModeBar": False}
        )
        st.caption(
            "Line: how far the stream behind each block is from the baseline's (20 dB is an error "
            "of a tenth). Bars: what each block adds of its own, given the baseline's stream."
        )
    if found.get("layers"):
        st.plotly_chart(
            proof_charts.layers(found), key=f"{key}_layers", config={"displayModeBar": False}
        )
        st.caption("Signal to noise of each layer's weights; empty where the shape changed.")
    if kl := found.get("kl_nats"):
        _tokens(found["tokens"], kl, found["first_divergence"])


def _tokens(tokens: list[str], kl: list[float], first: int | None) -> None:
    spans = []
    for at, (token, value) in enumerate(zip(tokens, kl, strict=True)):
        strength = min(0.75, 0.75 * value / RED_NATS) if value > COLOURED_NATS else 0.0
        style = f"background: rgba(213,69,90,{strength:.2f}); border-radius: 3px;"
        if at == first:
            style += " outline: 2px solid rgb(213,69,90);"
        text = html.escape(token.replace("\n", "⏎\n"))
        spans.append(f'<span style="{style}" title="KL {value:.4f} nats">{text}</span>')
    st.html('<div style="white-space: pre-wrap; line-height: 1.7">' + "".join(spans) + "</div>")
    where = "nowhere in this text" if first is None else f"after token {first + 1}, outlined"
    st.caption(
        f"Coloured where the prediction after a token moved by more than {COLOURED_NATS:g} nats, "
        f"full red at {RED_NATS:g}. The likeliest token first differs {where}."
    )


def _weights(card: Mapping[str, Any], key: str) -> None:
    found = card.get("damage", {}).get("histograms")
    if not found:
        st.caption("Not compared.")
        return
    kind = st.segmented_control(
        "Kind of layer", list(found), default=next(iter(found)), key=f"{key}_kind"
    )
    kind = kind or next(iter(found))
    st.plotly_chart(
        proof_charts.weights(kind, found[kind]),
        key=f"{key}_weights_{kind}",
        config={"displayModeBar": False},
    )
