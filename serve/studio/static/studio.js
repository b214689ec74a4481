// The three pages that do something by themselves: comparing, a run through its steps, choosing without names.
"use strict";

const root = document.body.dataset.root;
const by = (id) => document.getElementById(id);

async function ask(path, body, signal) {
  const answer = await fetch(root + path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (answer.redirected) {
    location.assign(`${root}/login`);
    throw new Error("Log in again.");
  }
  let said;
  try {
    said = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(`The service answers ${answer.status}: ask again, or see its log.`);
  }
  if (!answer.ok) throw new Error(said.error ? said.error.message : JSON.stringify(said.detail));
  return said;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function comparing(form) {
  const status = by("status"), pictures = by("pictures");
  let latest = new AbortController(), settling = 0;

  async function fill(figure, wish, mine) {
    const made = await ask("/pictures", wish, mine.signal);
    if (mine !== latest) return; // of an earlier strength, and later than the newer one's
    const image = figure.querySelector("img");
    image.src = made.image;
    const scores = figure.querySelector("dl");
    scores.replaceChildren();
    for (const [name, value] of Object.entries(made.scores))
      scores.append(element("dt", { textContent: name }), element("dd", { textContent: value.toFixed(3) }));
    const link = figure.querySelector("a");
    Object.assign(link, { href: made.image, download: `${wish.model.replace(/\W+/g, "-")}_${wish.seed}.png`, hidden: false });
  }

  async function draw(again) {
    clearTimeout(settling); // what it would draw again is drawn now
    latest.abort(); // nobody waits for those any more
    const mine = latest = new AbortController(), data = new FormData(form);
    const prompt = data.get("prompt"), strength = Number(data.get("strength"));
    const models = data.getAll("model"), first = Number(data.get("seed"));
    if (!models.length) return void (status.textContent = "Choose a model.");
    if (!again) {
      pictures.replaceChildren();
      for (let seed = first; seed < first + Number(data.get("count")); seed++) {
        const row = element("div", { className: "seed" });
        for (const model of models) {
          const figure = element("figure", {},
            element("img", { alt: `${prompt}, by ${model}, seed ${seed}` }),
            element("figcaption", {}, element("strong", { textContent: model }), ` seed ${seed}`, element("dl"),
              element("a", { textContent: "Download", ariaLabel: `Download the picture by ${model}, seed ${seed}`, hidden: true })));
          figure.wish = { prompt, model, seed };
          row.append(figure);
        }
        pictures.append(row);
      }
    }
    const figures = [...pictures.querySelectorAll("figure")];
    for (const figure of figures) {
      figure.querySelector("img").removeAttribute("src");
      figure.querySelector("dl").replaceChildren();
      figure.querySelector("a").hidden = true;
    }
    let done = 0;
    const failed = new Set();
    status.textContent = `Sampling ${figures.length} pictures …`;
    await Promise.all(figures.map(async (figure) => {
      try {
        await fill(figure, { strength, ...figure.wish }, mine);
        done += 1;
      } catch (error) {
        failed.add(error.message);
      }
      if (mine === latest) status.textContent = [`${done} of ${figures.length} pictures`, ...failed].join(". ");
    }));
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); draw(false); });
  by("strength").addEventListener("input", (event) => { by("amount").value = event.target.value; });
  by("strength").addEventListener("change", () => { // each key press is one
    clearTimeout(settling);
    settling = setTimeout(() => { if (pictures.childElementCount) draw(true); }, 300);
  });
}

function sliding(slider) {
  const versions = slider.dataset.versions.split(",");
  function show() {
    const index = Number(slider.value);
    by("steps").value = versions[index];
    slider.setAttribute("aria-valuetext", `after ${versions[index]} steps`);
    for (const figure of document.querySelectorAll(".cards figure")) {
      const frames = figure.querySelectorAll(".frame");
      frames.forEach((frame, place) => frame.classList.toggle("chosen", place === index));
      figure.querySelector(".now").src = frames[index].src;
    }
  }
  slider.addEventListener("input", show);
  show();
}

function choosing(form) {
  const status = by("status"), section = by("pair"), buttons = [...section.querySelectorAll("button")];
  let pair = null, chosen = 0, latest = 0;

  async function next() {
    const mine = ++latest;
    buttons.forEach((button) => { button.disabled = true; });
    pair = null;
    try {
      const made = await ask("/pairs", Object.fromEntries(new FormData(form)));
      if (mine !== latest) return; // begun again meanwhile
      by("asked").textContent = made.prompt;
      section.hidden = false;
      await Promise.all(["left", "right"].map((side) => new Promise((resolve, reject) => {
        by(side).onload = resolve;
        by(side).onerror = () => reject(new Error("A picture could not be made."));
        by(side).src = `${root}/pairs/${made.id}/${side}.png`;
      })));
      if (mine !== latest) return;
      pair = made.id;
      buttons.forEach((button) => { button.disabled = false; });
      status.textContent = chosen ? `${chosen} chosen` : "The keys ←, → and = choose too.";
    } catch (error) {
      if (mine === latest) status.textContent = error.message;
    }
  }

  async function choose(choice) {
    if (!pair) return;
    const of = pair;
    pair = null;
    try {
      await ask(`/pairs/${of}`, { choice });
      chosen += 1;
      await next();
    } catch (error) {
      status.textContent = error.message;
    }
  }

  form.addEventListener("submit", (event) => { event.preventDefault(); next(); });
  buttons.forEach((button) => button.addEventListener("click", () => choose(button.dataset.choice)));
  document.addEventListener("keydown", (event) => {
    const choice = { ArrowLeft: "left", ArrowRight: "right", "=": "same" }[event.key];
    if (event.repeat || event.altKey || event.ctrlKey || event.metaKey) return;
    if (choice && pair && !["SELECT", "INPUT"].includes(document.activeElement.tagName)) {
      event.preventDefault();
      choose(choice);
    }
  });
}

if (by("compare")) comparing(by("compare"));
if (by("version")) sliding(by("version"));
if (by("match")) choosing(by("match"));
