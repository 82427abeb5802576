// The browser's half of pages/parts/live_chart.py: keeps one Plotly drawing per chart and feeds it.
//
// Only what can be seen is drawn: a chart that is scrolled away, or in a hidden tab, takes the new
// numbers and draws them when it comes into view. While a zoom is being dragged nothing is redrawn.
// Every text goes through textContent, or loses its markup characters before Plotly sees it.

const charts = new WeakMap()
let plotly = null

export function draw({ data, parentElement }) {
  if (!parentElement.isConnected || !data) return
  let chart = charts.get(parentElement)
  if (!chart) charts.set(parentElement, (chart = new Chart(parentElement)))
  chart.take(unpack(data))
}

export function remove(parentElement) {
  charts.get(parentElement)?.end()
  charts.delete(parentElement)
}

function loadPlotly(url) {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script")
    script.src = new URL(url, document.baseURI).href
    script.onload = () => (window.Plotly ? resolve(window.Plotly) : reject(new Error("no Plotly")))
    script.onerror = () => {
      script.remove()
      plotly = null // the next refresh tries again
      reject(new Error("not served"))
    }
    document.head.append(script)
  })
  return plotly
}

function unpack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const length = view.getUint32(0, true)
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)))
  let offset = 4 + length
  const floats = (count) => {
    const values = new Array(count)
    for (let i = 0; i < count; i += 1) values[i] = view.getFloat32(offset + 4 * i, true)
    offset += 4 * count
    return values
  }
  let times = []
  for (const line of head.lines) {
    // Plotly shows dates as UTC, so the browser's own offset is added to have local time.
    if (!line.shared) times = floats(line.count).map((s) => local(head.start + s))
    line.x = times
    line.y = floats(line.count).map((v) => (Number.isNaN(v) ? null : v))
  }
  head.bytes = bytes
  head.range = [local(head.start), local(head.end)]
  return head
}

// A range of days changes every few seconds only: what is the same is not drawn again.
function same(a, b) {
  if (a.length !== b.length) return false
  for (let i = 0; i < a.length; i += 1) if (a[i] !== b[i]) return false
  return true
}

function local(seconds) {
  return seconds * 1000 - new Date(seconds * 1000).getTimezoneOffset() * 60000
}

function three(value) {
  if (value === null || value === undefined) return "—"
  if (value === 0) return "0"
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))))
  return value.toLocaleString("en-US", {
    minimumFractionDigits: Math.min(digits, 6),
    maximumFractionDigits: Math.min(digits, 6),
  })
}

// Plotly reads hexadecimal and rgb() colours, but no color-mix().
function faded(color, opacity) {
  const hex = /^#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})/i.exec(color.trim())
  if (!hex) return "rgba(128,128,128,0.1)"
  return `rgba(${hex.slice(1, 4).map((part) => parseInt(part, 16)).join(",")},${opacity})`
}

// Plotly's fill bridges what its line leaves open: here it goes down to zero at both sides of a hole.
function grounded(x, y) {
  const [xs, ys] = [[], []]
  y.forEach((value, i) => {
    if (value !== null) {
      if (i > 0 && y[i - 1] === null) xs.push(x[i]) && ys.push(0)
      xs.push(x[i])
      ys.push(value)
    } else if (i > 0 && y[i - 1] !== null) xs.push(x[i - 1]) && ys.push(0)
  })
  return [xs, ys]
}

function element(tag, name, parent) {
  const made = document.createElement(tag)
  made.className = name
  parent.append(made)
  return made
}

class Chart {
  constructor(parent) {
    this.root = parent.querySelector(".gptlab-chart")
    this.root.textContent = ""
    this.head = element("div", "gptlab-head", this.root)
    this.title = element("div", "gptlab-title", this.head)
    this.keys = element("div", "gptlab-keys", this.head)
    this.reset = element("button", "gptlab-reset", this.head)
    this.reset.type = "button"
    this.reset.textContent = "Reset zoom"
    this.reset.hidden = true
    this.reset.onclick = () => this.unzoom()
    this.plot = element("div", "gptlab-plot", this.root)
    this.note = element("div", "gptlab-note", this.root)
    this.zoom = { x: null, y: null }
    this.visible = false
    this.held = false
    this.drawn = false
    this.draws = 0
    this.observer = new IntersectionObserver((entries) => {
      this.visible = entries[entries.length - 1].isIntersecting
      this.draw()
    })
    this.observer.observe(this.root)
    this.resized = new ResizeObserver(() => this.draw())
    this.resized.observe(this.root)
    this.release = () => {
      this.held = false
      setTimeout(() => this.draw(), 0)
    }
    this.show = () => this.draw()
    this.plot.addEventListener("pointerdown", () => (this.held = true), true)
    window.addEventListener("pointerup", this.release)
    document.addEventListener("visibilitychange", this.show)
  }

  end() {
    this.observer.disconnect()
    this.resized.disconnect()
    window.removeEventListener("pointerup", this.release)
    document.removeEventListener("visibilitychange", this.show)
    if (this.drawn) window.Plotly.purge(this.plot)
  }

  take(data) {
    if (this.drawn && same(data.bytes, this.data.bytes) && this.look() === this.drawnLook) return
    this.data = data
    this.plot.style.height = `${data.height}px`
    loadPlotly(data.plotly).then(
      (library) => {
        this.library = library
        this.draw()
      },
      () => {
        this.note.textContent =
          "The charts cannot be drawn: plotly.min.js did not load. Reload the page, or start the " +
          "app with “streamlit run app.py”."
      },
    )
  }

  look() {
    return ["text-color", "background-color", "font"]
      .map((name) => getComputedStyle(this.root).getPropertyValue(`--st-${name}`))
      .join()
  }

  unzoom() {
    this.zoom = { x: null, y: null }
    this.draw()
  }

  draw() {
    const { data, library } = this
    if (!data || !library || !this.visible || document.hidden || this.held) return
    if (!this.root.isConnected || this.root.clientWidth === 0) return
    const began = performance.now()
    const style = getComputedStyle(this.root)
    const theme = (name) => style.getPropertyValue(`--st-${name}`).trim()
    const palette = theme("chart-categorical-colors").split(",")
    const colors = data.lines.map((line) => palette[line.color % palette.length] || "#3b82f6")
    const known = data.lines.map((line) => line.y.some((v) => v !== null))
    this.label(colors)
    this.note.textContent = known.some(Boolean) ? "" : data.empty
    // The first line is the most telling one, so it is drawn last, on top.
    const traces = data.lines.flatMap((line, i) => this.traces(line, colors[i], known[i])).reverse()
    library.react(this.plot, traces, this.layout(theme), { displayModeBar: false, doubleClick: false })
    if (!this.drawn) {
      this.drawn = true
      this.plot.on("plotly_relayout", (change) => this.zoomed(change))
      this.plot.on("plotly_doubleclick", () => this.unzoom())
    }
    this.drawnLook = this.look()
    this.draws += 1
    this.root.dataset.draws = this.draws
    this.root.dataset.ms = (performance.now() - began).toFixed(1)
  }

  traces(line, color, known) {
    const mode = { dots: "lines+markers", points: "markers" }[line.style] ?? "lines"
    const drawn = {
      type: "scatter",
      mode,
      name: line.name.replace(/[<>&]/g, " "),
      x: line.x,
      y: line.y,
      visible: known,
      connectgaps: false,
      line: { color, width: line.y.length > 320 ? 1 : 1.75 },
      marker: { color, size: line.y.length > 20 ? 3.5 : 5 },
      hovertemplate: `%{y:,.3~g} ${this.data.unit}${line.name ? "" : "<extra></extra>"}`,
    }
    if (line.style !== "area") return [drawn]
    const [x, y] = grounded(line.x, line.y)
    const fill = { color, width: 0 }
    return [
      drawn,
      {
        type: "scatter",
        mode: "lines",
        x,
        y,
        visible: known,
        line: fill,
        fill: "tozeroy",
        fillcolor: faded(color, 0.14),
        hoverinfo: "skip",
      },
    ]
  }

  layout(theme) {
    const text = theme("text-color")
    const grid = theme("border-color-light") || theme("border-color")
    const axis = {
      gridcolor: grid,
      zerolinecolor: grid,
      linecolor: grid,
      tickcolor: grid,
      fixedrange: false,
    }
    return {
      uirevision: "kept",
      autosize: true,
      height: this.data.height,
      margin: { l: 8, r: 12, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: theme("font"), size: 12, color: text },
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: {
        bgcolor: theme("secondary-background-color"),
        bordercolor: theme("border-color"),
        font: { family: theme("font"), size: 12, color: text },
      },
      dragmode: "zoom",
      xaxis: {
        ...axis,
        type: "date",
        automargin: true,
        showgrid: false,
        nticks: 6,
        range: this.zoom.x ?? this.data.range,
        tickformatstops: [
          { dtickrange: [null, 59999], value: "%H:%M:%S" },
          { dtickrange: [60000, 21599999], value: "%H:%M" },
          { dtickrange: [21600000, 86399999], value: "%H:%M\n%d %b" },
          { dtickrange: [86400000, null], value: "%d %b" },
        ],
        hoverformat: "%d %b, %H:%M:%S",
      },
      yaxis: {
        ...axis,
        automargin: true,
        nticks: 5,
        ticksuffix: this.data.unit.length < 4 ? ` ${this.data.unit}` : "",
        separatethousands: true,
        range: this.zoom.y ?? [0, this.data.top ?? this.highest()],
      },
    }
  }

  highest() {
    const [from, to] = (this.zoom.x ?? this.data.range).map((v) =>
      typeof v === "number" ? v : Date.parse(`${v.replace(" ", "T")}Z`),
    )
    let most = 0
    for (const line of this.data.lines) {
      for (let i = 0; i < line.x.length; i += 1) {
        if (line.x[i] >= from && line.x[i] <= to && line.y[i] > most) most = line.y[i]
      }
    }
    return most > 0 ? most * 1.08 : 1
  }

  zoomed(change) {
    if (change["xaxis.range[0]"] !== undefined)
      this.zoom.x = [change["xaxis.range[0]"], change["xaxis.range[1]"]]
    if (change["yaxis.range[0]"] !== undefined)
      this.zoom.y = [change["yaxis.range[0]"], change["yaxis.range[1]"]]
    this.reset.hidden = !this.zoom.x && !this.zoom.y
  }

  label(colors) {
    const { data } = this
    this.reset.hidden = !this.zoom.x && !this.zoom.y
    this.title.textContent = data.title
    element("span", "", this.title).textContent =
      `, ${data.unit}` + (data.note ? ` · ${data.note}` : "")
    this.keys.textContent = ""
    data.lines.forEach((line, i) => {
      const key = element("div", "gptlab-key", this.keys)
      if (line.name) {
        element("i", "", key).style.background = colors[i]
        element("span", "", key).textContent = line.name
      }
      key.append(three(line.now ?? line.y.findLast((v) => v !== null)))
    })
  }
}
