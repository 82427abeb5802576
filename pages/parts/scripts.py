"""How a component of ours finds its script: fetched once by address, then handed every refresh.

What a component declares as its own JavaScript is sent again with each refresh, so that is only the
few lines below. The script itself lies in ``assets/`` and is served by the routes of ``app.py``; it
exports ``draw(component)`` and, where it holds something, ``remove(parentElement)``.
"""

from __future__ import annotations

import json

_STUB = """
const address = ADDRESS
const missing = "This part of the page needs a script that this server does not serve: start the "
  + "app with “streamlit run app.py”."
export default function (component) {
  const shared = ((globalThis.gptlabScripts ??= {})[address] ??= { tries: 0, script: null })
  const query = shared.tries ? `?try=${shared.tries}` : ""
  shared.script ??= import(new URL(address + query, document.baseURI).href)
  shared.script.then(
    (script) => script.draw(component),
    () => {
      shared.script = null
      shared.tries += 1
      component.parentElement.querySelector("[data-gptlab]").textContent = missing
    },
  )
  return () => shared.script?.then((script) => script.remove?.(component.parentElement), () => {})
}
"""


def stub(name: str) -> str:
    """Return the JavaScript of a component that ``assets/name`` draws.

    The component's HTML must be one element with the attribute ``data-gptlab``.
    """
    return _STUB.replace("ADDRESS", json.dumps(f"/gptlab/{name}"))
