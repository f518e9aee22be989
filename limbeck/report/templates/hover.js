"use strict";
(() => {
  const points = JSON.parse(document.getElementById("points").textContent);

  for (const figure of document.querySelectorAll(".chart")) {
    const rows = points[figure.dataset.chart];
    const plot = figure.querySelector(".plot");
    const [hair, bead, tip] = [".hair", ".bead", ".tip"].map((name) => figure.querySelector(name));
    let at = rows.length - 1;

    const show = (index) => {
      at = Math.max(0, Math.min(rows.length - 1, index));
      const [x, y, lines] = rows[at];
      hair.style.left = bead.style.left = x + "%";
      bead.style.top = y + "%";
      tip.replaceChildren(
        ...lines.map((line) => {
          const part = document.createElement("div");
          part.textContent = line;
          return part;
        })
      );
      for (const part of [hair, bead, tip]) part.hidden = false;
      const room = plot.clientWidth;
      const left = (room * x) / 100 + 12;
      tip.style.left = Math.max(0, left + tip.offsetWidth > room ? left - 24 - tip.offsetWidth : left) + "px";
    };
    const hide = () => {
      for (const part of [hair, bead, tip]) part.hidden = true;
    };
    const nearest = (x) => {
      let [low, high] = [0, rows.length - 1];
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (rows[middle][0] < x) low = middle;
        else high = middle;
      }
      return x - rows[low][0] < rows[high][0] - x ? low : high;
    };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(nearest((100 * (event.clientX - box.left)) / box.width));
    });
    plot.addEventListener("pointerleave", hide);
    figure.addEventListener("focus", () => figure.matches(":focus-visible") && show(at));
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const stride = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -rows.length, End: rows.length }[event.key];
      if (stride === undefined) return;
      event.preventDefault();
      show(at + stride);
    });
  }

  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copy);
      getSelection().selectAllChildren(source);
      let done = false;
      try {
        await navigator.clipboard.writeText(source.textContent);
        done = true;
      } catch {
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected: copy with your keyboard";
      setTimeout(() => (button.textContent = "Copy"), 2500);
    });
  }
})();
