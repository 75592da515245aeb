# SPDX-License-Identifier: Apache-2.0
"""ImageNet as plain strings: open_clip's class names and templates, timm's WordNet ids."""

import open_clip
from timm.data import ImageNetInfo


def imagenet_classnames() -> list[str]:
    """The 1000 class names that OpenAI's zero-shot numbers use, in WordNet-id order."""
    return list(open_clip.IMAGENET_CLASSNAMES)


def imagenet_templates() -> list[str]:
    """The 80 templates of OpenAI's zero-shot numbers, ``{}`` standing for the class name."""
    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def imagenet_wordnet_ids() -> list[str]:
    """The WordNet ids (n01440764 ...) of the 1000 classes of ILSVRC-2012, in their order."""
    return list(ImageNetInfo("imagenet-1k").label_names())
