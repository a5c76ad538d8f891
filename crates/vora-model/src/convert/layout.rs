//! The layouts that checkpoints have, and which becomes which.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use serde::{Serialize, Serializer};

/// How a checkpoint lies on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A language model in one GGUF file.
    Gguf,
    /// A language model's folder, as HF transformers reads it.
    Llm,
    /// The language model below a VoRA's adapters, as it was before training.
    FrozenLlm,
    /// A VoRA with its adapters merged: `llm.model…`, `vision_embedding…`.
    Vora,
    /// A VoRA with its adapters beside their weights.
    VoraUnmerged,
    /// A VoRA's adapter in PEFT's layout, with the vision weights in `vision.safetensors`: a run's `final/`.
    Peft,
    /// The adapter of a plain language model, in PEFT's layout.
    PeftLlm,
    /// The adapter of a LLaVA, in PEFT's layout, under the names of either of its classes.
    PeftLlava,
    /// LLaVA under the names of the published checkpoints: `language_model.model…`, `vision_tower…`.
    Llava,
    /// LLaVA under the names that its modules have in transformers 5: `model.language_model…`, `lm_head`.
    LlavaTransformers5,
    /// The eyes of a LLaVA (encoder and projection), or of a VoRA that has Gemma 4's, in one GGUF file, as llama.cpp takes them
    /// beside the language model's.
    Mmproj,
    /// Any other safetensors.
    Safetensors,
}

use Layout::{
    FrozenLlm, Gguf, Llava, LlavaTransformers5, Llm, Mmproj, Peft, PeftLlava, PeftLlm, Safetensors, Vora, VoraUnmerged,
};

impl Layout {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Gguf,
        Llm,
        FrozenLlm,
        Vora,
        VoraUnmerged,
        Peft,
        PeftLlm,
        PeftLlava,
        Llava,
        LlavaTransformers5,
        Mmproj,
        Safetensors,
    ];

    /// The name that it is asked for by.
    pub fn name(self) -> &'static str {
        match self {
            Gguf => "gguf",
            Llm => "llm",
            FrozenLlm => "frozen-llm",
            Vora => "vora",
            VoraUnmerged => "vora-unmerged",
            Peft => "peft",
            PeftLlm => "peft-llm",
            PeftLlava => "peft-llava",
            Llava => "llava",
            LlavaTransformers5 => "llava-transformers5",
            Mmproj => "mmproj",
            Safetensors => "safetensors",
        }
    }

    /// What a checkpoint of this layout can become.
    pub fn targets(self) -> &'static [Self] {
        match self {
            Gguf | PeftLlm | Llm | FrozenLlm => &[Llm, Gguf],
            Vora => &[Vora, Llm, Gguf, Mmproj],
            VoraUnmerged => &[VoraUnmerged, Vora, Peft, FrozenLlm],
            Peft => &[VoraUnmerged, Vora],
            PeftLlava => &[Llava, LlavaTransformers5],
            Llava | LlavaTransformers5 => &[Llava, LlavaTransformers5, Llm, Gguf, Mmproj],
            Mmproj => &[],
            Safetensors => &[Safetensors],
        }
    }

    /// The layout to write: the one asked for, else the same, else the only one but for GGUF, which is asked for always.
    pub(super) fn target(self, asked: Option<Self>) -> Result<Self> {
        let targets = self.targets();
        let listed = || targets.iter().map(|to| to.name()).collect::<Vec<_>>().join(" or ");
        if let Some(to) = asked {
            ensure!(
                self != Safetensors || to == self,
                "it is no language model, LLaVA or VoRA: as the safetensors that it is, it cannot become {to}"
            );
            ensure!(targets.contains(&to), "{self} cannot become {to}, only {}", listed());
            return Ok(to);
        }
        match targets {
            [only] | [only, Gguf] => Ok(*only),
            _ if targets.contains(&self) => Ok(self),
            _ => bail!("{self} can become {}: say which", listed()),
        }
    }

    /// Whether it is more than a language model.
    pub(super) fn sees(self) -> bool {
        matches!(self, Vora | VoraUnmerged | Peft | PeftLlava | Llava | LlavaTransformers5)
    }

    /// Whether adapters are folded into their weights on the way.
    pub(super) fn merges_into(self, to: Self) -> bool {
        matches!((self, to), (VoraUnmerged | Peft, Vora) | (PeftLlm, Llm) | (PeftLlava, Llava | LlavaTransformers5))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Layout {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|layout| layout.name() == name) {
            Some(layout) => Ok(layout),
            None => bail!("`{name}` is no layout, known are {}", Self::ALL.map(Self::name).join(", ")),
        }
    }
}

impl Serialize for Layout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
