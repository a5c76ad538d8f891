//! The keys of a run file's `model`.

use anyhow::{Result, anyhow, ensure};
use serde::{Deserialize, Deserializer, Serialize};
use vora_image::TokenBudget;
use vora_llm::VisionAttention;
use vora_lora::LoraConfig;
use vora_model::{ALL_LINEAR, MmProjectorType, VisionEmbeddingType};
use vora_vision::{PositionTable, VisionFeatureLayer};

use super::model_type::ModelType;
use super::vq::VqTraining;

/// What is trained. Some keys are for one type alone; another type's file that gives one is refused.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The way it sees.
    #[serde(default, rename = "type")]
    pub model_type: ModelType,
    /// The language model, for a Chameleon the start of its decoder, for a Gemma 4 Unified all of it: a folder, or a name on
    /// the hub.
    pub llm: String,
    /// A chat template (Jinja) in place of the LLM's own; it goes with the trained model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Side of a picture, in pixels; with `max_image_tokens` that of the square whose patches have positions of their own.
    /// A Gemma 4 Unified takes pictures in their own shape and needs none.
    #[serde(default)]
    pub image_size: i64,
    /// What becomes of a picture that is not square, where it does not keep its shape. Absent: what `model.pretrained` or a published recipe's
    /// `frames_ops` does with it, else `pad`. It is stored in the model's folder, and evaluations and answers see the
    /// same pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_aspect_ratio: Option<ImageAspectRatio>,
    /// The colour that `pad` pads with, red, green and blue from 0 to 255; absent: the mean that pictures are normalised
    /// with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background_color: Option<[u8; 3]>,
    /// The adapters. A VoRA has some; a LLaVA may. An `r` below 0 attaches none, as in the published recipe for
    /// fine-tuning: of the LLM only the biases are trained that a published model's adapted layers have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// What to start from in place of new weights. For a LLaVA a run's `final/`, whose projector is taken, and whose
    /// encoder with what was trained of it, adapters folded in. For a VoRA a run's `final/` or a merged folder: with `lora` its
    /// adapters and patch embedding, without it and with `freeze_llm: false` all its weights, merged.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub pretrained: Option<String>,

    /// VoRA: what pictures go through. `AIMv2Embedding` is the published VoRA's: convolution, RMSNorm, a table of positions,
    /// projection. `gemma4_unified` is Gemma 4's, in patches of `patch_size`: a matrix between layer norms, a table of columns
    /// and one of rows, RMSNorm, projection; its pictures are not normalised where no teacher's processor does. Absent: that of
    /// `model.pretrained`, else `AIMv2Embedding`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_embedding: Option<VisionEmbeddingType>,
    /// VoRA: channels between patchifier and projection; absent: the teacher's hidden size, or 1536 without one; the LLM's
    /// hidden size for `gemma4_unified`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_embedding_intermediate_size: Option<i64>,
    /// VoRA: side of a patch, in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<i64>,
    /// VoRA: the most tokens that a picture becomes. Given, a picture keeps its own shape: it is resized to whole patches,
    /// the nearest to its size, made smaller to at most so many, and gets positions by `pos_embed: interpolate`. The
    /// teacher sees the same pixels. Absent: squares, or what `model.pretrained` does. Gemma 4 Unified: 70, 140, 280, 560 or
    /// 1120, its processor's `max_soft_tokens`; absent: the folder's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_image_tokens: Option<u32>,
    /// VoRA: the fewest, which a smaller picture is enlarged to; absent: 1. The maximum goes before, where no grid of a
    /// picture's shape has a number between the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_image_tokens: Option<u32>,
    /// VoRA, Gemma 4 Unified: the teacher, a folder or a name on the hub. Absent: no distillation.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub aux_vision: Option<String>,
    /// VoRA: whether the teacher has a class token that no patch of the student's meets; absent: as the teacher is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_aux_cls: Option<bool>,
    /// VoRA: `preprocessor`: the patch embedding starts as the teacher's.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub reuse_aux_vision_embedding_layers: Option<String>,
    /// VoRA: how it starts as the teacher's. Absent: `scaled`, and `copied` in a published recipe whose teacher it fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reuse_aux_vision_start: Option<TeacherStart>,
    /// VoRA: whether the tokens of a picture see each other in both directions; absent: they do.
    #[serde(default, alias = "vision_attention_mask", skip_serializing_if = "Option::is_none")]
    pub vision_attention: Option<VisionAttention>,
    /// VoRA: whether pictures right beside each other see each other too, as in the released code; absent: as in
    /// `model.pretrained`, else not, but in a published recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fuse_adjacent_images: Option<bool>,
    /// VoRA: which rows of the position table a picture of another size gets: `interpolate`, or `first_rows` as in the
    /// released code; absent: as in `model.pretrained`, else `interpolate`, but in a published recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pos_embed: Option<PositionTable>,

    /// LLaVA: the encoder, a folder or a name on the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_tower: Option<String>,
    /// LLaVA: adapters on the encoder, with the keys of `lora` but for `acts_on` and `answers_on`; `target_modules` are
    /// the encoder's own names, absent: every linear layer (`[all-linear]`), and `layers` counts the blocks that
    /// `vision_feature_layer` depends on. Absent: none.
    #[serde(default, deserialize_with = "vision_lora", skip_serializing_if = "Option::is_none")]
    pub vision_lora: Option<LoraConfig>,
    /// Parts that are trained whole, in f32, and would else stay frozen. LLaVA: `[vision_tower]`, all weights of the encoder
    /// that `vision_feature_layer` depends on; `learning_rates.vision_tower` is its own rate. Gemma 4 Unified:
    /// `[vision_embedder]`, the matrix that it sees through with norms, positions and projection; `learning_rates.model`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub train: Vec<TrainedPart>,
    /// LLaVA: the projection; absent: `mlp2x_gelu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mm_projector_type: Option<MmProjectorType>,
    /// LLaVA: which of the encoder's hidden states are projected; absent: -2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_feature_layer: Option<VisionFeatureLayer>,
    /// Whether the LLM's own weights stay as they are (a LLaVA's first stage, and its second with `lora`; a VoRA's
    /// first); absent: they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze_llm: Option<bool>,
    /// VoRA, LLaVA, Gemma 4 Unified: whether the frozen weights of the linear layers in the LLM's blocks are kept in four bits while the run
    /// trains: HF's `bnb_4bit_quant_type: nf4` with `bnb_4bit_use_double_quant: true` (QLoRA). Embedding, head and norms
    /// stay as they are, and what the run leaves has its adapters over the LLM as it is stored. A product makes a weight
    /// whole again, which saves memory and takes time.
    #[serde(default, skip_serializing_if = "is_false")]
    pub load_in_4bit: bool,
    /// VoRA, LLaVA, Gemma 4 Unified: the same in eight bits, integers with a scale a row: the weights of LLM.int8. Its activations in eight
    /// bits and its outlier columns are not there: the product is that of the weight made whole again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub load_in_8bit: bool,

    /// Chameleon: the image tokenizer, which the run makes before its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vqmodel: Option<VqTraining>,
    /// Chameleon: the coefficient of z-loss; absent: 1e-5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub z_loss: Option<f64>,
}

/// A part that is trained whole where a run file says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedPart {
    /// A LLaVA's encoder.
    VisionTower,
    /// What a Gemma 4 Unified sees through.
    VisionEmbedder,
}

/// What becomes of a picture that is not square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageAspectRatio {
    /// Bars make it a square.
    Pad,
    /// It is resized to a square, whatever its proportions.
    Squash,
    /// What lies beyond a square in its middle is cut off.
    Crop,
}

/// How a patch embedding starts as the teacher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TeacherStart {
    /// Convolution and positions are the teacher's, brought to the sizes of patches, grid and word embeddings.
    Scaled,
    /// Every tensor of the teacher's `preprocessor` is taken as it is, as in the released code: for AIMv2 in Apple's own
    /// layout, of the same sizes.
    Copied,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A name; none where it is empty, as the published code has it.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|name| !name.is_empty()))
}

/// Adapters of an encoder: on every linear layer where no targets are named.
fn vision_lora<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<LoraConfig>, D::Error> {
    let Some(mut keys) = Option::<serde_json::Map<String, serde_json::Value>>::deserialize(deserializer)? else {
        return Ok(None);
    };
    keys.entry("target_modules").or_insert_with(|| serde_json::json!([ALL_LINEAR]));
    serde_json::from_value(keys.into()).map(Some).map_err(serde::de::Error::custom)
}

impl ModelConfig {
    /// How many tokens a picture may become that keeps its own shape; none where pictures become squares.
    ///
    /// # Errors
    /// Names the key that leaves no picture possible.
    pub fn token_budget(&self) -> Result<Option<TokenBudget>> {
        let Some(max_image_tokens) = self.max_image_tokens else {
            ensure!(self.min_image_tokens.is_none(), "model.min_image_tokens is given without model.max_image_tokens");
            return Ok(None);
        };
        ensure!(
            self.image_aspect_ratio.is_none() && self.background_color.is_none(),
            "model.image_aspect_ratio and background_color make squares, with model.max_image_tokens pictures keep their shape"
        );
        let patch_size = u32::try_from(self.patch_size.unwrap_or(0))?;
        let budget = TokenBudget::new(patch_size, self.min_image_tokens.unwrap_or(1), max_image_tokens);
        budget.map(Some).map_err(|error| anyhow!("model.{error}"))
    }

    /// The coefficient of z-loss: Chameleon's own (section 2.3) where nothing is said.
    pub fn z_loss(&self) -> f64 {
        match self.model_type {
            ModelType::Chameleon => self.z_loss.unwrap_or(1e-5),
            ModelType::Vora | ModelType::Llava | ModelType::Gemma4Unified | ModelType::Own => 0.0,
        }
    }

    /// Whether the patch embedding starts as the teacher's; without a teacher nothing does.
    pub fn starts_from_teacher(&self) -> bool {
        self.aux_vision.is_some() && self.reuse_aux_vision_embedding_layers.as_deref() == Some("preprocessor")
    }

    /// The adapters that are attached; none where `lora` has an `r` below 0.
    pub fn adapters(&self) -> Option<&LoraConfig> {
        self.lora.as_ref().filter(|lora| lora.r >= 0)
    }

    /// Whether pictures keep their shape.
    pub fn keeps_shape(&self) -> bool {
        self.max_image_tokens.is_some() || self.model_type == ModelType::Gemma4Unified
    }

    /// Whether what a Gemma 4 Unified sees through is trained.
    pub fn trains_vision_embedder(&self) -> bool {
        self.train.contains(&TrainedPart::VisionEmbedder)
    }

    /// Whether a LLaVA's encoder is trained whole.
    pub fn trains_vision_tower(&self) -> bool {
        self.train.contains(&TrainedPart::VisionTower)
    }

    /// The key that keeps the LLM's linear layers in few bits; none where they keep the dtype's.
    pub fn few_bits_key(&self) -> Option<&'static str> {
        match (self.load_in_4bit, self.load_in_8bit) {
            (true, _) => Some("model.load_in_4bit"),
            (false, true) => Some("model.load_in_8bit"),
            (false, false) => None,
        }
    }

    /// Whether the LLM's own weights stay as they are.
    pub fn freezes_llm(&self) -> bool {
        self.freeze_llm.unwrap_or(true)
    }
}
