//! The ways that a language model gets to see.

use serde::{Deserialize, Serialize};

/// How a language model gets to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelType {
    /// Adapters in a frozen LLM learn to see; a vision transformer teaches them.
    #[default]
    Vora,
    /// A vision transformer sees, frozen unless it is said otherwise; a projection brings what it saw among the words.
    Llava,
    /// Pictures are tokens of one vocabulary with the words, and the whole decoder learns to read and write both.
    Chameleon,
    /// A decoder that was pretrained with patches as its pictures, and is taught by adapters and the matrix that it sees through.
    #[serde(rename = "gemma4_unified")]
    Gemma4Unified,
    /// A model that a program makes itself and hands to the trainer (`Student::from_parts`); `vora` opens none of them.
    Own,
}

impl ModelType {
    /// Those whose parameters have names known here.
    const KNOWN: [Self; 4] = [Self::Vora, Self::Llava, Self::Chameleon, Self::Gemma4Unified];

    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vora => "vora",
            Self::Llava => "llava",
            Self::Chameleon => "chameleon",
            Self::Gemma4Unified => "gemma4_unified",
            Self::Own => "own",
        }
    }

    /// What the names of its trained parameters begin with.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Vora => &["llm", "vision_embedding", "aux_vision"],
            Self::Llava => &["language_model", "multi_modal_projector", "vision_tower"],
            Self::Chameleon => &["model", "lm_head"],
            Self::Gemma4Unified => &["language_model", "model", "aux_vision"],
            Self::Own => &[],
        }
    }

    /// Whether a parameter's name, or the beginning of one, can only be in a model of another type.
    pub fn lacks(self, name: &str) -> bool {
        let first = name.split('.').next().unwrap_or_default();
        let has = |this: Self| this.parts().contains(&first);
        self != Self::Own && !has(self) && Self::KNOWN.into_iter().any(has)
    }
}
