// Draws the ranked next tokens: two bars a row (the model's own probability, and what the draw
// sees), three numbers, and a click that writes on with that token.

import { bar, element, percent, visible } from "./pieces.js"

export function draw({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector("[data-gptlab]")
  const table = element("div", "table")
  table.setAttribute("role", "table")
  const titles = element("div", "row titles dim")
  titles.append(...["", "token", "", "raw", data.temperature, "after all"].map((t) => element("span", "", t)))
  table.append(titles)
  for (const one of data.rows) {
    const row = element("button", one.probabilities[2] === 0 ? "row out" : "row")
    row.type = "button"
    row.title = data.pick ? "Write on with this token" : ""
    row.disabled = !data.pick
    row.dataset.token = one.id
    const bars = element("span", "bars")
    bars.append(bar(one.probabilities[0], "bar raw"), bar(one.probabilities[2], "bar"))
    row.append(
      element("span", "rank dim", one.rank),
      element("span", "piece", visible(one.text)),
      bars,
      ...one.probabilities.map((p) => element("span", "value", percent(p))),
    )
    row.onclick = () => setTriggerValue("pick", { look: data.look, id: one.id })
    table.append(row)
  }
  root.replaceChildren(table)
}
