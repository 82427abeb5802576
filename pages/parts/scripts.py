"""How a component of ours finds its script: fetched once by address, then handed every refresh.

What a component declares as its own JavaScript is sent again with each refresh, so that is only the
few lines below. The script itself lies in ``assets/`` and is served by the routes of ``app.py``; it
exports ``draw(component)`` and, where it holds something, ``remove(parentElement)``.

Refreshes that come while a browser still fetches the script are handed over in any order: a browser
does not say which of two imports of one address ends first. So each refresh carries its time, and
one that is older than what is drawn is left out.
"""

from __future__ import annotations

import json
import struct
import time
from typing import Any

_STUB = """
const address = ADDRESS
const missing = "This part of the page needs a script that this server does not serve: start the "
  + "app with “streamlit run app.py”."
const newest = new WeakMap()

function opened(data) {
  if (!(data instanceof Uint8Array)) return data
  const turn = new DataView(data.buffer, data.byteOffset).getFloat64(0, true)
  return { turn, data: data.subarray(8) }
}

export default function ({ data: given, ...component }) {
  const { turn, data } = opened(given)
  const { parentElement } = component
  if (newest.get(parentElement) > turn) return
  newest.set(parentElement, turn)
  const shared = ((globalThis.gptlabScripts ??= {})[address] ??= { tries: 0, script: null })
  const query = shared.tries ? `?try=${shared.tries}` : ""
  shared.script ??= import(new URL(address + query, document.baseURI).href)
  shared.script.then(
    (script) => script.draw({ ...component, data }),
    () => {
      shared.script = null
      shared.tries += 1
      parentElement.querySelector("[data-gptlab]").textContent = missing
    },
  )
  return () => {
    if (newest.get(parentElement) !== turn) return
    return shared.script?.then((script) => script.remove?.(parentElement), () => {})
  }
}
"""


def stub(name: str) -> str:
    """Return the JavaScript of a component that ``assets/name`` draws.

    The component's HTML must be one element with the attribute ``data-gptlab``.
    """
    return _STUB.replace("ADDRESS", json.dumps(f"/gptlab/{name}"))


def dated(data: dict[str, Any] | bytes) -> dict[str, Any] | bytes:
    """Return ``data`` with the time of this refresh, as the lines of ``stub`` expect it.

    They hand the script what was given here. Microseconds since 1970 fit a JavaScript number.
    """
    turn = time.time_ns() // 1000
    if isinstance(data, bytes):
        return struct.pack("<d", turn) + data
    return {"turn": turn, "data": data}
