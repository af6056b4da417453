"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const REASONS = {
    kept: "kept",
    towards_one: "kept: it violates, but moves the ratio towards one",
    token: "token: w_t D_t > δ",
    budget: "budget: c_t < w_t D_t ≤ δ",
    response: "response: dropped whole",
    clipped: "clipped ratio",
  };
  const PART = 256;
  const REJECTING = ["token", "budget", "response", "clipped"];
  const state = { response: 0, method: 0, now: null };
  let response, decided, tokens, position, cursor;

  const make = (name, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(name), properties);
    node.append(...children);
    return node;
  };
  const percent = (share) => (100 * share).toFixed(1) + "%";
  const number = (x) => {
    const size = Math.abs(x);
    if (x === 0) return "0";
    return size < 1e-3 || size >= 1e5 ? x.toExponential(3) : String(Number(x.toPrecision(5)));
  };
  const rgb = (name, alpha) => `rgb(var(--${name}) / ${alpha.toFixed(3)})`;

  // A packed array as a function of the token; see `_packed` in inspect/page.py.
  const column = (of, place) => {
    if (place === null) return null;
    const content = of.arrays[place];
    if (typeof content === "number") return () => content;
    let values;
    return (i) => (values ??= new Float32Array(Uint8Array.from(atob(content), (c) => c.charCodeAt(0)).buffer))[i];
  };
  const unpacked = (of) => {
    if (of.log_mu instanceof Function) return of;
    for (const name of ["log_mu", "log_pi", "advantage"]) of[name] = column(of, of[name]);
    for (const each of of.decisions) {
      for (const name of data.columns) each[name] = column(of, each[name]);
    }
    return of;
  };

  const valid = (i) => response.mask === null || response.mask[i] === "1";
  const reason = (of, i) => data.reasons[of.reason[i]];
  const left = (of, i) => (of.update_mask ? of.update_mask(i) : REJECTING.includes(reason(of, i)) ? 0 : 1);
  const rejected = (of, i) => (valid(i) ? 1 - left(of, i) : 0);
  const against = (i) => (decided.weighted_divergence || decided.divergence)(i);
  const largest = () => response.ids.reduce((most, _, i) => (valid(i) ? Math.max(most, against(i)) : most), 1e-9);
  const delta = () => decided.delta ?? largest();

  const special = new Set(data.special);
  const shown = (id) => make("bdi", { textContent: data.texts[id], className: special.has(id) ? "special" : "" });
  const append = (place, ids) => {
    const nodes = ids.map(shown), parts = [];
    // The browser lays out only the parts in sight.
    for (let begin = 0; begin < nodes.length; begin += PART) {
      const ended = (node) => (node.textContent.endsWith("¶") ? [node, make("br")] : [node]);
      parts.push(make("div", {}, ...nodes.slice(begin, begin + PART).flatMap(ended)));
    }
    place.replaceChildren(...parts);
    return nodes;
  };

  const title = (of) =>
    `${percent(of.decisions[state.method].share)} masked · step ${of.step} · update ${of.update} · A ${of.sign} · ` +
    `score ${number(of.score)} · ${of.ids.length} tokens · ${of.key}`;

  function listResponses() {
    const order = data.responses.map((_, i) => i);
    const share = (i) => data.responses[i].decisions[state.method].share;
    order.sort((a, b) => share(b) - share(a) || a - b);
    at("response").replaceChildren(...order.map((i) => make("option", { value: i, textContent: title(data.responses[i]) })));
    at("response").value = state.response;
  }

  function chooseResponse(which) {
    state.response = which;
    response = unpacked(data.responses[which]);
    append(at("prompt"), response.prompt);
    at("prompt").hidden = response.prompt.length === 0;
    tokens = append(at("text"), response.ids);
    at("text").scrollTop = 0;
    let t = 0;
    position = tokens.map((node, i) => {
      node.dataset.i = i;
      node.tabIndex = -1;
      if (!valid(i)) node.classList.add("tool");
      return valid(i) ? ++t : 0;
    });
    state.now = null;
    chooseMethod(state.method);
    const first = tokens.findIndex((_, i) => rejected(decided, i) > 0.5);
    show(first < 0 ? 0 : first);
  }

  function chooseMethod(which) {
    state.method = which;
    decided = response.decisions[which];
    at("about").textContent =
      `${data.methods[which]} masks ${percent(decided.share)} of this response` +
      (decided.delta === null ? "" : `; δ = ${number(decided.delta)}`) +
      (decided.delta_b === null ? "" : `, δ_b = ${number(decided.delta_b)} in force`);
    colour();
    strip();
    if (state.now !== null) show(state.now);
  }

  function colour() {
    const view = at("view").value;
    tokens.forEach((node, i) => {
      if (!valid(i)) return;
      const why = reason(decided, i), taken = rejected(decided, i);
      let back = "transparent";
      if (view === "divergence") {
        const x = against(i) / delta();
        back = x <= 1 ? rgb("budget", 0.55 * x) : rgb("token", Math.min(0.9, 0.55 + 0.175 * (x - 1)));
      } else if (view === "count") {
        const count = response.decisions.reduce((sum, each) => sum + rejected(each, i), 0);
        back = rgb("clipped", (0.85 * count) / response.decisions.length);
      } else if (why === "towards_one") {
        back = rgb(why, 0.4);
      } else if (taken > 0) {
        back = rgb(why, 0.65 * taken);
      }
      node.style.backgroundColor = back;
      node.style.borderBottomColor = taken > 0 ? rgb(why, taken) : "transparent";
    });
    const swatch = (background, text, className = "") => {
      const sample = make("i", { className });
      sample.style.background = background;
      return make("span", {}, sample, text);
    };
    const items = [];
    const what = decided.weighted_divergence ? "w_t D_t" : "D_t";
    if (view === "divergence") {
      const limit = decided.delta === null ? "the largest here (this method has no δ)" : `δ = ${number(decided.delta)}`;
      items.push(swatch(`linear-gradient(90deg, transparent, ${rgb("budget", 0.55)})`, `${what} from 0 to ${limit}`, "scale"));
      if (decided.delta !== null) {
        items.push(swatch(`linear-gradient(90deg, ${rgb("token", 0.55)}, ${rgb("token", 0.9)})`, "from δ to 3 δ and beyond", "scale"));
      }
    } else if (view === "count") {
      const all = response.decisions.length;
      items.push(swatch(`linear-gradient(90deg, transparent, ${rgb("clipped", 0.85)})`, `masked by none to all ${all} methods`, "scale"));
    }
    const inside = tokens.some((_, i) => reason(decided, i) === "kept" && rejected(decided, i) > 0.005);
    const present = new Set([...decided.reason].map((code) => data.reasons[code]));
    for (const [name, text] of Object.entries(REASONS)) {
      if (!present.has(name) || (name === "kept" && !inside) || (name === "towards_one" && view !== "reason")) continue;
      if (name === "kept") {
        items.push(swatch(rgb(name, 0.65), "inside: taken by the smooth gate within the thresholds", view === "reason" ? "" : "line"));
        continue;
      }
      items.push(view === "reason" ? swatch(rgb(name, name === "towards_one" ? 0.4 : 0.65), text) : swatch(rgb(name, 1), text, "line"));
    }
    if (present.has("")) items.push(make("span", { className: "faint", textContent: "hatched: not generated (tool output)" }));
    if (decided.update_mask) items.push(make("span", { className: "faint", textContent: "smooth gate: paler where less is taken" }));
    at("legend").replaceChildren(...items);
  }

  function strip() {
    const svg = at("strip"), places = tokens.map((_, i) => i).filter(valid);
    const limit = delta(), top = Math.min(Math.max(1.15 * largest(), 1.25 * limit), 3 * limit), height = 100;
    const y = (x) => height * (1 - Math.max(0, Math.min(1, x / top)));
    const draw = (className, d, fill) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", d);
      if (className) path.setAttribute("class", className);
      if (fill) path.style.fill = fill;
      return path;
    };
    svg.setAttribute("viewBox", `0 0 ${places.length} ${height}`);
    const bars = {};
    places.forEach((i, n) => {
      const why = rejected(decided, i) > 0 || reason(decided, i) === "towards_one" ? reason(decided, i) : "kept";
      bars[why] = (bars[why] ?? "") + `M${n + 0.08} ${height}V${y(against(i)).toFixed(2)}h0.84V${height}z`;
    });
    cursor = draw("now", "");
    const parts = [cursor, ...Object.entries(bars).map(([why, d]) => draw("", d, rgb(why, why === "kept" ? 0.6 : 1)))];
    let legend = `${decided.weighted_divergence ? "w_t D_t" : "D_t"} of each token, t = 1 to ${places.length}, coloured by reason; full height ${number(top)}`;
    if (decided.delta !== null) {
      parts.push(draw("line dashed", `M0 ${y(decided.delta)}H${places.length}`));
      legend += `; dashed: δ`;
    }
    if (decided.threshold) {
      parts.push(draw("line", "M" + places.map((i, n) => `${n} ${y(decided.threshold(i)).toFixed(2)}H${n + 1}`).join("L")));
      legend += "; line: c_t, the effective threshold (at the bottom where it is 0 or less)";
    }
    svg.replaceChildren(...parts);
    at("strip-legend").textContent = legend + ".";
  }

  function show(i) {
    if (state.now !== null) {
      tokens[state.now].classList.remove("now");
      tokens[state.now].tabIndex = -1;
    }
    state.now = i;
    const node = tokens[i];
    node.classList.add("now");
    node.tabIndex = 0;
    const head = make("p", {}, make("b", { textContent: valid(i) ? `t = ${position[i]} ` : "not generated " }), "token ");
    head.append(make("bdi", { textContent: data.texts[response.ids[i]] }), ` · id ${response.ids[i]}`);
    if (!valid(i)) {
      cursor.setAttribute("d", "");
      at("detail").replaceChildren(head, make("p", { className: "faint", textContent: "Tool output: no part of the loss, and every method ignores it." }));
      return;
    }
    cursor.setAttribute("d", `M${position[i] - 1} 0h1v100h-1z`);
    const why = reason(decided, i), ratio = Math.exp(response.log_pi(i) - response.log_mu(i));
    const numbers = [
      ["log μ", number(response.log_mu(i))],
      ["log π", number(response.log_pi(i))],
      ["ρ_t", number(ratio)],
      ["A_t", number(response.advantage(i))],
      ["D_t", number(decided.divergence(i))],
    ];
    if (decided.weighted_divergence) numbers.push(["w_t D_t", number(decided.weighted_divergence(i))]);
    if (decided.threshold) numbers.push(["c_t", number(decided.threshold(i))]);
    numbers.push(["M_t", number(left(decided, i))]);
    const list = make("dl", {}, ...numbers.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
    const by = response.decisions.flatMap((each, n) => {
      const taken = rejected(each, i);
      return taken < 0.005 ? [] : [data.methods[n] + (taken < 0.995 ? ` ${Math.round(100 * taken)}%` : "") + ` (${reason(each, i).replace("kept", "inside")})`];
    });
    at("detail").replaceChildren(
      head,
      list,
      make("p", { textContent: `${data.methods[state.method]}: ${REASONS[why]}` }),
      make("p", { className: "faint", textContent: `Masked by ${by.length} of ${response.decisions.length}${by.length ? ": " + by.join(", ") : ""}` }),
    );
  }

  const pointed = (event) => event.target.closest("#text bdi");
  for (const kind of ["mouseover", "focusin", "click"]) {
    at("text").addEventListener(kind, (event) => pointed(event) && show(Number(pointed(event).dataset.i)));
  }
  at("text").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = { Home: 0, End: tokens.length - 1 }[event.key] ?? (step ? state.now + step : -1);
    if (!tokens[next]) return;
    event.preventDefault();
    tokens[next].focus();
  });
  at("strip").addEventListener("click", (event) => {
    const box = at("strip").getBoundingClientRect();
    const t = Math.ceil(((event.clientX - box.left) / box.width) * Math.max(...position));
    tokens[position.indexOf(t)]?.focus();
  });
  at("response").addEventListener("change", () => chooseResponse(Number(at("response").value)));
  at("view").addEventListener("change", colour);
  at("method").addEventListener("change", () => {
    chooseMethod(Number(at("method").value));
    listResponses();
  });
  at("method").replaceChildren(...data.methods.map((label, i) => make("option", { value: i, textContent: label })));
  at("viewer").hidden = false;
  listResponses();
  at("response").selectedIndex = 0;
  chooseResponse(Number(at("response").value));
}
