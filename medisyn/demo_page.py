"""The page of the web demo, and its server. This is the only module that imports Gradio (extra `demo`).

- Nothing leaves the machine: no telemetry, no fonts or scripts from elsewhere, and a content security policy that
  keeps the browser from asking anyone else. What a visitor uploads is deleted when the server stops.
- One form is worked on at a time; the others wait in a queue.
- The notice stays in view wherever the page is scrolled to.

    medisyn demo --adapter adapters/knee-osteoarthritis
"""

import html
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from .console import one_line
from .demo import BANNER, MOST_IMAGES, UNKNOWN, Control, Form, Result, Studio, chosen_labels

NO_ADAPTER = "none"
HINT = "The images appear here. Click one to see what it was made from."
LARGEST_SEED = 2**31 - 1  # a browser's numbers are exact to 2**53
FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
STYLE = """
.gradio-container {max-width: 1400px !important; padding-top: 52px !important}
#notice {position: fixed; top: 0; left: 0; right: 0; z-index: 50; padding: 0; border: 0; border-radius: 0;
    background: #fff4d6; border-bottom: 1px solid #d9b44a}
#notice p {max-width: 1400px; margin: 0 auto; padding: 4px 32px; font-size: 15px; color: #4a3500}
#notice b {color: inherit}
#notice span {float: right; opacity: 0.8}
#hint, #result-line, #hint .padding, #result-line .padding {padding: 0}
#hint p {margin: 0; padding: 140px 24px; text-align: center; color: var(--body-text-color-subdued);
    border: 1px dashed var(--border-color-primary); border-radius: 8px}
#result-line p {color: var(--body-text-color-subdued); margin: 0; padding: 0 4px}
#result-line p.note {color: #8a5a00}
.group-title p {font-weight: 600; margin: 0}
.label-control .wrap {gap: 4px}
.label-control .wrap label {padding: 4px 7px; font-size: 13px}
.label-control .wrap label span {margin-left: 4px !important}
#gallery .grid-wrap {min-height: 0; max-height: 640px; overflow-y: auto}
#gallery .gallery-container:has(> .preview) {min-height: 420px}
#gallery > .wrap:has(.error), #hint > .wrap:has(.error) {display: none}
.toast-wrap {top: auto !important; bottom: 16px}
"""


def build_page(studio: Studio) -> gr.Blocks:
    """The page for a model and its adapters. Only what the model takes is shown."""
    abilities = studio.abilities
    kinds = {kind for ability in abilities.values() for kind in ability.kinds}
    adapters = [name for name in abilities if name is not None]
    controls: dict[str, gr.components.Component] = {}  # Form's fields, as far as the model has them
    label_controls: list[gr.components.Component] = []
    label_boxes: list[tuple[str, gr.Column]] = []  # of adapters
    examples = None

    with gr.Blocks(title="medisyn", analytics_enabled=False) as page:
        shown_name = f"<span>model: {html.escape(studio.model)}</span>"
        gr.HTML(f"<p><b>{BANNER}</b>{shown_name}</p>", elem_id="notice")
        with gr.Row(equal_height=True):
            if "text" in kinds:
                controls["prompt"] = gr.Textbox(
                    label="Prompt",
                    placeholder="What the images show",
                    value=abilities[None].examples[0][1] if abilities[None].examples else "",
                    lines=1,
                    max_lines=3,
                    scale=6,
                    elem_id="prompt",
                )
            start = gr.Button("Generate", variant="primary", scale=1, min_width=140, elem_id="generate")
        if "text" in kinds:
            examples = gr.Dataset(
                label="Examples",
                components=[controls["prompt"]],
                samples=[[prompt] for _, prompt in abilities[None].examples],
                sample_labels=[name for name, _ in abilities[None].examples],
                samples_per_page=9,
                elem_id="examples",
            )
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                if adapters:
                    weight, compare = _adapter_controls(controls, adapters)
                with gr.Row():
                    controls["num_images"] = gr.Slider(1, MOST_IMAGES, value=4, step=1, label="Images")
                    steps = studio.default("num_inference_steps")
                    controls["steps"] = gr.Slider(1, 100, value=steps, step=1, label="Steps")
                with gr.Row():
                    guidance = studio.default("guidance_scale")
                    controls["guidance"] = gr.Slider(0, 20, value=guidance, step=0.5, label="Guidance")
                    other_seed = gr.Button("Another", size="sm", render=False)
                    controls["seed"] = gr.Number(
                        value=0,
                        precision=0,
                        minimum=0,
                        maximum=LARGEST_SEED,
                        label="Seed of the first image",
                        buttons=[other_seed],
                        elem_id="seed",
                    )
                if "text" in kinds:
                    controls["negative_prompt"] = gr.Textbox(
                        label="Negative prompt", placeholder="What the images should not show", max_lines=3
                    )
                if studio.groups:
                    few = sum(len(group.controls) for group in studio.groups) <= 8
                    with gr.Accordion("Labels", open=few or "text" not in kinds):
                        for group in studio.groups:
                            with gr.Column(visible=group.adapter is None, min_width=200) as box:
                                gr.Markdown(group.title, elem_classes="group-title")
                                label_controls += _label_controls(group.controls)
                            if group.adapter is not None:
                                label_boxes.append((group.adapter, box))
                if "image" in kinds:
                    with gr.Accordion("Reference image", open=True):
                        controls["like"] = _image_input("The images shall be like this one")
                with gr.Accordion("Start from an image", open=False):
                    controls["init_image"] = _image_input("Noise is added to this image, and removed again")
                    controls["strength"] = gr.Slider(
                        0.05,
                        1,
                        value=studio.default("strength"),
                        step=0.05,
                        label="Strength",
                        info="How far to leave it",
                    )
            with gr.Column(scale=6, min_width=420):
                hint = gr.HTML(f"<p>{HINT}</p>", elem_id="hint")
                gallery = gr.Gallery(
                    label="Images",
                    show_label=False,
                    visible=False,
                    columns=4,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                line = gr.HTML(visible=False, elem_id="result-line")
                slider = gr.ImageSlider(
                    visible=False, interactive=False, type="filepath", max_height=420, elem_id="compare"
                )
                record = gr.JSON(visible=False, max_height=360, elem_id="provenance")
        result = gr.State(None)
        adapter = gr.State(None)  # that of the images shown

        names, inputs = list(controls), [*controls.values(), *label_controls]

        def generate(*values: Any, progress: gr.Progress = gr.Progress()) -> Sequence[Any]:  # noqa: B008
            try:
                form = _form(studio, dict(zip(names, values, strict=False)), values[len(names) :])
                made = studio.generate(form, lambda part: progress(part, desc="Generating"))
            except Exception as error:  # noqa: BLE001 - the page stays usable, whatever went wrong
                text, debug = html.escape(one_line(error), quote=False), os.environ.get("MEDISYN_DEBUG") == "1"
                raise gr.Error(text, print_exception=debug, duration=None) from error
            count = f"{len(made.files)} image{'s' * (len(made.files) != 1)}"
            return [
                made,
                form.adapter,
                gr.HTML(visible=False),
                gr.Gallery([str(file) for file in made.files], visible=True, selected_index=None),
                gr.HTML(_lines(f"{count} in {made.seconds:.1f} s", made.notes), visible=True),
                *_details(made, form.adapter, 0),
            ]

        def select(made: Result | None, used: str | None, event: gr.SelectData) -> Sequence[Any]:
            return [gr.skip(), gr.skip()] if made is None else _details(made, used, event.index)

        outputs = [result, adapter, hint, gallery, line, slider, record]
        triggers = [start.click] + ([controls["prompt"].submit] if "text" in kinds else [])
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            triggers,
            generate,
            inputs,
            outputs,
            show_progress_on=[hint, gallery],
            concurrency_limit=1,
            api_visibility="private",
        )
        gallery.select(select, [result, adapter], [slider, record], **quick)
        other_seed.click(lambda: random.randrange(LARGEST_SEED), None, controls["seed"], **quick)
        if examples is not None:
            examples.click(lambda sample: sample[0], examples, controls["prompt"], **quick)
        if adapters:
            own_guidance = any(ability.guidance is not None for ability in abilities.values())

            def choose(name: str) -> Sequence[Any]:
                ability = abilities[_adapter_name(name)]
                is_chosen = name != NO_ADAPTER
                updates: list[Any] = [
                    gr.Slider(value=ability.weight, visible=is_chosen),
                    gr.Checkbox(visible=is_chosen),
                ]
                if own_guidance:
                    default = studio.default("guidance_scale")
                    updates.append(gr.Slider(value=default if ability.guidance is None else ability.guidance))
                updates += [gr.Column(visible=owner == name) for owner, _ in label_boxes]
                if examples is not None:
                    samples = [[prompt] for _, prompt in ability.examples]
                    updates.append(gr.Dataset(samples=samples, sample_labels=[label for label, _ in ability.examples]))
                return updates

            changed: list[Any] = [
                weight,
                compare,
                *([controls["guidance"]] if own_guidance else []),
                *(box for _, box in label_boxes),
            ]
            changed += [] if examples is None else [examples]
            controls["adapter"].change(choose, controls["adapter"], changed, **quick)
    return page


def serve(studio: Studio, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Show the page until Ctrl-C.

    Args:
        studio: The model.
        host: Address to listen at.
        port: Of the server.
        ready: Is called with the page's address as soon as it can be opened.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # the browser would keep what was asked, over the end of the session
    page = build_page(studio).queue(default_concurrency_limit=1)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        allowed_paths=[str(studio.folder)],
        theme=gr.themes.Default(primary_hue="teal", font=FONTS, font_mono=("ui-monospace", "monospace")),
        css=STYLE,
        app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_restrict)]},
    )
    try:
        ready(page.local_url)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


def _adapter_controls(controls: dict[str, Any], adapters: Sequence[str]) -> tuple[gr.Slider, gr.Checkbox]:
    with gr.Row():
        controls["adapter"] = gr.Dropdown(
            [NO_ADAPTER, *adapters], value=NO_ADAPTER, label="Adapter", elem_id="adapter"
        )
        controls["weight"] = gr.Slider(0, 2, value=1, step=0.05, label="Weight", visible=False)
    controls["compare"] = gr.Checkbox(
        value=True, label="Make the same images without the adapter", visible=False, elem_id="compare-too"
    )
    return controls["weight"], controls["compare"]


def _label_controls(controls: Sequence[Control]) -> list[gr.components.Component]:
    """Two beside each other."""
    made: list[gr.components.Component] = []
    for first in range(0, len(controls), 2):
        with gr.Row():
            for control in controls[first : first + 2]:
                kind = gr.Radio if control.is_short else gr.Dropdown
                made.append(
                    kind(
                        list(control.choices),
                        value=UNKNOWN,
                        label=control.title,
                        min_width=150,
                        elem_classes="label-control",
                    )
                )
    return made


def _image_input(label: str) -> gr.Image:
    # As a file and in its own mode, so that medisyn reads it as it reads files from the command line.
    return gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=220)


def _form(studio: Studio, values: dict[str, Any], labels: Sequence[str | None]) -> Form:
    """The values of a page as a form; what has been emptied is an error, not a default."""
    if values["seed"] is None:
        raise ValueError("the seed is empty; give a whole number")
    for name in ("like", "init_image"):
        values[name] = Path(values[name]) if values.get(name) else None
    chosen = _adapter_name(values.get("adapter"))
    values |= {"adapter": chosen, "labels": chosen_labels(studio.groups, labels, chosen)}
    return Form(**values)


def _lines(line: str, notes: Sequence[str]) -> str:
    return f"<p>{line}</p>" + "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _adapter_name(shown: str | None) -> str | None:
    return None if shown in (None, NO_ADAPTER) else shown


def _details(made: Result, adapter: str | None, index: int) -> list[Any]:
    """Slider and provenance for one of the images."""
    title = f"Image {index + 1} of {len(made.files)}"
    provenance = gr.JSON(made.records[index], label=f"{title}: provenance, as in the file", visible=True)
    if not made.without:
        return [gr.ImageSlider(visible=False), provenance]
    pair = (str(made.without[index]), str(made.files[index]))
    return [gr.ImageSlider(pair, label=f"{title}: without | with {adapter}", visible=True), provenance]


async def _restrict(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
