# SPDX-License-Identifier: Apache-2.0

"""Templates of the model card and of the dataset card, in Jinja, and the citation that both have."""

CITATION = """\
@misc{anil2025finetuning,
    title         = {Fine-Tuning Diffusion Models via Intermediate Distribution Shaping},
    author        = {Gautham Govind Anil and Shaan Ul Haque and Nithish Kannen and Dheeraj Nagaraj and
                     Sanjay Shakkottai and Karthikeyan Shanmugam},
    year          = {2025},
    eprint        = {2510.02692},
    archivePrefix = {arXiv},
    primaryClass  = {cs.LG}
}"""
ADAPTER_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ what }} {{ base }}, fine-tuned on rewards with {{ method }} in trl_pgraft: groups of images were drawn, the best of
each group accepted, and the adapter fitted to the noisy states that they came from.
{%- if start %} Training continued {{ start }}; its
reference is the base model without it.{% endif %}
{% if grid %}
![Base model above, tuned model below, same prompts and seeds]({{ grid }})
{% endif %}
## Use

```python
{{ snippet }}
```

{{ switch }}
{% if is_lora %}
Other loaders, `pipeline.load_lora_weights("{{ repo_id }}")` and PEFT among them, run it at all noise levels.
{% else %}
It is stored in PEFT's format alone, which diffusers' own loaders do not read.
{% endif %}{% if metrics %}
## Results

Mean rewards on {{ metrics_source }}, {{ "adapter that was continued" if start else "base model" }} -> tuned model:

{% for line in metrics %}- {{ line }}
{% endfor %}{% endif %}{% if rewards or settings or prompts %}
## Training
{% if rewards %}
Rewards:

{% for line in rewards %}- {{ line }}
{% endfor %}{% endif %}{% if settings %}
Settings:

{% for line in settings %}- {{ line }}
{% endfor %}{% endif %}{% if prompts %}
Some of the prompts:

{% for line in prompts %}- {{ line }}
{% endfor %}{% endif %}{% endif %}
## Citation

```bibtex
{{ citation }}
```
"""
CORRECTOR_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A noise corrector for {{ base }}, made with trl_pgraft without any reward: the sampler's exact inverse maps real data
to noise, which is not quite standard normal because the model is imperfect, and the corrector ({{ what }}) carries
standard normal noise to noise of that kind. Sampling runs the corrector first, then the model.

## Use

```python
{{ snippet }}
```

{% if facts %}Trained on:

{% for line in facts %}- {{ line }}
{% endfor %}
{% endif %}## Citation

```bibtex
{{ citation }}
```
"""
SAMPLES_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

Images that a diffusion model drew while it was fine-tuned with trl_pgraft, their rewards, and which of them were
accepted. Each round of the run is a folder of parquet files and adds to the ones before.

| column | what it holds |
| --- | --- |
| `prompt`, `image` | the prompt and the final image |
| `reward` | weighted sum of the rewards, NaN where a sample was left out |
| `reward_<name>` | value of each reward function |
| `accepted` | whether the sample was trained on |
| `round` | number of the round, from 0 |
| `group` | samples of a round with the same number were compared with each other |
| `seed` | seed of all the sample's noise |
| `x_I`, `t_I` | the state on the way to the image as the denoiser saw it, and its timestep (none: the final latents) |
| `fingerprint` | hash of model, scheduler and sampling arguments |

```python
from datasets import load_dataset
from trl_pgraft import GraftConfig, PGraftTrainer

# With the pipeline and the configuration that drew the samples; another one is refused by the fingerprint.
samples = load_dataset("{{ repo_id }}", split="train")
PGraftTrainer(GraftConfig(...), sd_pipeline=pipeline, samples_dataset=samples).train()
```

## Citation

```bibtex
{{ citation }}
```
"""
