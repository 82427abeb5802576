// Draws a text token by token: unusual ones coloured, alternatives on hover or focus, a click
// branches.

import { bar, element, percent, visible } from "./pieces.js"

const UNUSUAL = 0.55 // tokens that the model expected less than this are coloured
const FAR = 1 // nats between two variants from which the colour is full
const instances = new WeakMap()

function span(token, index) {
  const made = element("span", "token", token.t)
  const unusual = token.r < UNUSUAL && !token.f
  const surprise = unusual ? (1 - token.r / UNUSUAL) ** 2 : 0
  made.style.setProperty("--surprise", Math.round(42 * surprise))
  made.classList.toggle("unusual", unusual)
  made.classList.toggle("forced", token.f)
  made.dataset.index = index
  made.dataset.token = token.i
  made.tabIndex = -1
  return made
}

function row(state, index, token, other) {
  const chosen = other.i === token.i
  const made = element("button", chosen ? "row chosen" : "row")
  made.type = "button"
  made.dataset.token = other.i
  made.title = chosen ? "This token was drawn" : "Write on from here with this token instead"
  made.append(
    element("span", "piece", visible(other.t)),
    bar(other.r),
    element("span", "value", percent(other.r)),
    element("span", "value dim", percent(other.s)),
  )
  made.onclick = () => {
    hide(state)
    if (!chosen) state.branch({ run: state.run, index, id: other.i })
  }
  return made
}

function show(state, index) {
  clearTimeout(state.leaving)
  const token = state.tokens[index]
  const titles = element("div", "row titles dim")
  titles.append(
    element("span", "", "alternatives"),
    element("span"),
    element("span", "value", "model"),
    element("span", "value", "drawn"),
  )
  const head = element("div", "head")
  head.append(
    element("span", "", `${index + 1} · ${visible(token.t)}`),
    element("span", "dim", token.f ? "given" : `${percent(token.r)} · ${percent(token.s)}`),
  )
  state.box.replaceChildren(head)
  if (state.apart[index] !== undefined) {
    const nats = state.apart[index].toPrecision(2)
    state.box.append(element("div", "foot", `${nats} nats between the two variants before it`))
  }
  if (token.a?.length) {
    const rows = token.a.map((other) => row(state, index, token, other))
    const foot = "model: its own probability; drawn: after the samplers. Click one to write on."
    state.box.append(titles, ...rows, element("div", "dim foot", foot))
  } else if (state.busy) {
    state.box.append(element("div", "dim foot", "Alternatives are here once the text is finished."))
  }
  place(state, state.text.children[index + 1])
}

function place(state, anchor) {
  const { box } = state
  if (!box.matches(":popover-open")) box.showPopover()
  const at = anchor.getBoundingClientRect()
  const room = document.documentElement
  const below = at.bottom + 2 + box.offsetHeight <= room.clientHeight
  box.style.left = `${Math.max(4, Math.min(at.left, room.clientWidth - box.offsetWidth - 4))}px`
  box.style.top = `${below ? at.bottom + 2 : Math.max(4, at.top - box.offsetHeight - 2)}px`
}

function hide(state) {
  clearTimeout(state.leaving)
  if (state.box.matches(":popover-open")) state.box.hidePopover()
}

function step(state, event) {
  const at = Number(event.target.dataset?.index)
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1 }[event.key]
  if (event.key === "Escape") hide(state)
  else if (to !== undefined && state.text.children[to + 1] && to >= 0) {
    state.text.children[to + 1].focus()
    event.preventDefault()
  } else if (event.key === "ArrowDown" && event.target.dataset?.index !== undefined) {
    state.box.querySelector("button")?.focus()
    event.preventDefault()
  }
}

function create(parent) {
  const root = parent.querySelector("[data-gptlab]")
  const text = element("div", "text")
  const box = element("div", "box")
  box.popover = "manual"
  root.replaceChildren(text, box)
  const state = { text, box, tokens: [], apart: [], run: null, busy: false, branch: () => {}, leaving: 0 }
  const over = (event) => {
    const index = event.target.dataset?.index
    if (index !== undefined) show(state, Number(index))
  }
  text.onmouseover = over
  text.addEventListener("focusin", over)
  text.onmouseleave = () => (state.leaving = setTimeout(() => hide(state), 250))
  box.onmouseenter = () => clearTimeout(state.leaving)
  box.onmouseleave = () => hide(state)
  root.onkeydown = (event) => step(state, event)
  return state
}

export function draw({ data, parentElement, setTriggerValue }) {
  if (!instances.has(parentElement)) instances.set(parentElement, create(parentElement))
  const state = instances.get(parentElement)
  state.branch = (value) => setTriggerValue("branch", value)
  if (state.run !== data.run || data.tokens.length < state.tokens.length) {
    state.text.replaceChildren(element("span", "before", data.before))
    state.tokens = []
    state.run = data.run
    hide(state)
  }
  const drawn = state.tokens.length
  state.tokens = data.tokens
  state.busy = data.busy
  state.text.append(...data.tokens.slice(drawn).map((token, i) => span(token, drawn + i)))
  if (state.text.children[1]) state.text.children[1].tabIndex = 0
  for (const made of state.text.querySelectorAll(".mark")) made.classList.remove("mark")
  if (data.mark !== null) state.text.children[data.mark + 1]?.classList.add("mark")
  state.text.classList.toggle("busy", data.busy)
  state.apart = data.apart
  data.tokens.forEach((_, i) => {
    const made = state.text.children[i + 1]
    const far = Math.min(1, Math.sqrt((data.apart[i] ?? 0) / FAR))
    made.style.setProperty("--far", Math.round(65 * far))
    made.classList.toggle("apart", data.apart[i] !== undefined)
  })
}

export function remove(parentElement) {
  instances.delete(parentElement)
}
