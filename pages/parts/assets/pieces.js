// What the drawings of tokens share. Text only ever goes through textContent, so that nothing a
// model writes can become HTML or script.

export function element(tag, name = "", text = "") {
  const made = document.createElement(tag)
  made.className = name
  made.textContent = text
  return made
}

export function visible(text) {
  return text === ""
    ? "∅"
    : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣")
}

export function percent(ratio) {
  if (ratio === 0) return "0 %"
  return ratio < 0.0005 ? "< 0.1 %" : `${(100 * ratio).toFixed(1)} %`
}

export function bar(ratio, name = "bar") {
  const made = element("span", name)
  made.style.setProperty("--share", ratio === 0 ? "0%" : `${Math.max(1, 100 * ratio)}%`)
  return made
}
