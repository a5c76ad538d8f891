//! The run file's `model`: which way a language model gets to see, and what it is made of.

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Deserializer, Serialize};
use vora_image::TokenBudget;
use vora_llm::VisionAttention;
use vora_lora::{ActsOn, LoraConfig};
use vora_model::{ALL_LINEAR, MmProjectorType};
use vora_vision::{PositionTable, VisionFeatureLayer, VqConfig};

/// The three ways that are compared.
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
    /// A model that a program makes itself and hands to the trainer (`Student::from_parts`); `vora` opens none of them.
    Own,
}

impl ModelType {
    /// Those whose parameters have names known here.
    const KNOWN: [Self; 3] = [Self::Vora, Self::Llava, Self::Chameleon];

    /// The name in run files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vora => "vora",
            Self::Llava => "llava",
            Self::Chameleon => "chameleon",
            Self::Own => "own",
        }
    }

    /// What the names of its trained parameters begin with.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Vora => &["llm", "vision_embedding", "aux_vision"],
            Self::Llava => &["language_model", "multi_modal_projector", "vision_tower"],
            Self::Chameleon => &["model", "lm_head"],
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

/// What is trained. Some keys are for one type alone; another type's file that gives one is refused.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The way it sees.
    #[serde(default, rename = "type")]
    pub model_type: ModelType,
    /// The language model, for a Chameleon the start of its decoder: a folder, or a name on the hub.
    pub llm: String,
    /// A chat template (Jinja) in place of the LLM's own; it goes with the trained model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Side of a picture, in pixels; with `max_image_tokens` that of the square whose patches have positions of their own.
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

    /// VoRA: the patch embedding; only `AIMv2Embedding` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_embedding: Option<String>,
    /// VoRA: channels between patchifier and projection; absent: the teacher's hidden size, or 1536 without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_embedding_intermediate_size: Option<i64>,
    /// VoRA: side of a patch, in pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<i64>,
    /// VoRA: the most tokens that a picture becomes. Given, a picture keeps its own shape: it is resized to whole patches,
    /// the nearest to its size, made smaller to at most so many, and gets positions by `pos_embed: interpolate`. The
    /// teacher sees the same pixels. Absent: squares, or what `model.pretrained` does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_image_tokens: Option<u32>,
    /// VoRA: the fewest, which a smaller picture is enlarged to; absent: 1. The maximum goes before, where no grid of a
    /// picture's shape has a number between the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_image_tokens: Option<u32>,
    /// VoRA: the teacher, a folder or a name on the hub. Absent: no distillation.
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
    /// LLaVA: parts that are trained whole and would else stay frozen: `[vision_tower]`, all weights of the encoder that
    /// `vision_feature_layer` depends on, in f32. `learning_rates.vision_tower` is its own rate.
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
    /// VoRA, LLaVA: whether the frozen weights of the linear layers in the LLM's blocks are kept in four bits while the run
    /// trains: HF's `bnb_4bit_quant_type: nf4` with `bnb_4bit_use_double_quant: true` (QLoRA). Embedding, head and norms
    /// stay as they are, and what the run leaves has its adapters over the LLM as it is stored. A product makes a weight
    /// whole again, which saves memory and takes time.
    #[serde(default, skip_serializing_if = "is_false")]
    pub load_in_4bit: bool,
    /// VoRA, LLaVA: the same in eight bits, integers with a scale a row: the weights of LLM.int8. Its activations in eight
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
}

/// The way a model sees, with the keys that it cannot do without.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Way<'a> {
    /// By adapters in the LLM.
    Vora {
        /// Side of a patch, in pixels.
        patch_size: i64,
    },
    /// Through an encoder.
    Llava {
        /// The encoder, a folder or a name on the hub.
        vision_tower: &'a str,
    },
    /// By tokens.
    Chameleon {
        /// The image tokenizer and its training.
        vqmodel: &'a VqTraining,
    },
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

/// An image tokenizer and its training; the keys of its sizes are those of HF's `ChameleonVQVAEConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VqTraining {
    /// Entries of the codebook.
    pub num_embeddings: i64,
    /// Channels of an entry.
    pub embed_dim: i64,
    /// Channels after the first convolution, and before the codebook.
    pub base_channels: i64,
    /// Channels of each level over `base_channels`; each level after the first halves the sides.
    pub channel_multiplier: Vec<i64>,
    /// Residual blocks of a level.
    pub num_res_blocks: usize,
    /// Groups of channels that a norm takes together; 32 in Meta's.
    pub norm_num_groups: i64,
    /// Steps of AdamW.
    pub steps: u64,
    /// Pictures a step.
    pub batch_size: u64,
    /// The learning rate.
    pub learning_rate: f64,
}

impl Default for VqTraining {
    /// One code of 256 for 8 x 8 pixels: trains on a CPU.
    fn default() -> Self {
        Self {
            num_embeddings: 256,
            embed_dim: 16,
            base_channels: 32,
            channel_multiplier: vec![1, 1, 1, 1],
            num_res_blocks: 1,
            norm_num_groups: 8,
            steps: 300,
            batch_size: 16,
            learning_rate: 2e-3,
        }
    }
}

impl VqTraining {
    /// The tokenizer of pictures of `image_size` pixels a side.
    pub fn config(&self, image_size: i64) -> VqConfig {
        VqConfig {
            embed_dim: self.embed_dim,
            num_embeddings: self.num_embeddings,
            latent_channels: self.base_channels,
            resolution: image_size,
            base_channels: self.base_channels,
            channel_multiplier: self.channel_multiplier.clone(),
            num_res_blocks: self.num_res_blocks,
            norm_num_groups: self.norm_num_groups,
            attn_type: Some("none".to_owned()),
            ..VqConfig::default()
        }
    }
}

/// The published name of the patch embedding: conv, RMSNorm, positions, projection.
const VISION_EMBEDDING: &str = "AIMv2Embedding";

impl ModelConfig {
    /// The way the model sees. Keys are set one by one, by the file and by overrides, so what is missing shows only here.
    ///
    /// # Errors
    /// Names the key that is missing; a model of a program's own sees in a way that only the program knows.
    pub fn way(&self) -> Result<Way<'_>> {
        Ok(match self.model_type {
            ModelType::Vora => Way::Vora {
                patch_size: self
                    .patch_size
                    .context("model.patch_size is missing, a VoRA cuts pictures into patches")?,
            },
            ModelType::Llava => Way::Llava {
                vision_tower: self
                    .vision_tower
                    .as_deref()
                    .context("model.vision_tower is missing, a LLaVA sees through an encoder")?,
            },
            ModelType::Chameleon => Way::Chameleon {
                vqmodel: self
                    .vqmodel
                    .as_ref()
                    .context("model.vqmodel is missing, a Chameleon reads pictures as its codes")?,
            },
            ModelType::Own => bail!(
                "model.type is `own`: a program makes such a model itself and hands it to the trainer, by \
                 Student::from_parts of vora-train"
            ),
        })
    }

    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the key.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.llm.is_empty(), "model.llm is empty, it takes a folder or a name on the hub");
        self.refuse_keys_of_other_types()?;
        let at_least_one = [
            ("image_size", Some(self.image_size)),
            ("patch_size", self.patch_size),
            ("vision_embedding_intermediate_size", self.vision_embedding_intermediate_size),
        ];
        for (key, value) in at_least_one {
            let value = value.unwrap_or(1);
            ensure!(value >= 1, "model.{key} is {value}, it must be at least 1");
        }
        if let Some(lora) = self.adapters() {
            lora.validate().map_err(|error| anyhow!("model.{error}"))?;
        }
        ensure!(
            self.background_color.is_none()
                || self.image_aspect_ratio.is_none_or(|ratio| ratio == ImageAspectRatio::Pad),
            "model.background_color is given, but model.image_aspect_ratio does not pad"
        );
        self.validate_few_bits()?;
        if self.model_type == ModelType::Own {
            return Ok(());
        }
        match self.way()? {
            Way::Vora { patch_size } => self.validate_vora(patch_size),
            Way::Llava { .. } => {
                self.validate_vision_lora()?;
                self.refuse_adapters_on_trained_weights()
            }
            Way::Chameleon { vqmodel } => self.validate_chameleon(vqmodel),
        }
    }

    fn refuse_keys_of_other_types(&self) -> Result<()> {
        let keys = [
            ("vision_embedding", self.vision_embedding.is_some(), ModelType::Vora),
            ("vision_embedding_intermediate_size", self.vision_embedding_intermediate_size.is_some(), ModelType::Vora),
            ("patch_size", self.patch_size.is_some(), ModelType::Vora),
            ("max_image_tokens", self.max_image_tokens.is_some(), ModelType::Vora),
            ("min_image_tokens", self.min_image_tokens.is_some(), ModelType::Vora),
            ("aux_vision", self.aux_vision.is_some(), ModelType::Vora),
            ("skip_aux_cls", self.skip_aux_cls.is_some(), ModelType::Vora),
            ("reuse_aux_vision_embedding_layers", self.reuse_aux_vision_embedding_layers.is_some(), ModelType::Vora),
            ("reuse_aux_vision_start", self.reuse_aux_vision_start.is_some(), ModelType::Vora),
            ("vision_attention", self.vision_attention.is_some(), ModelType::Vora),
            ("fuse_adjacent_images", self.fuse_adjacent_images.is_some(), ModelType::Vora),
            ("pos_embed", self.pos_embed.is_some(), ModelType::Vora),
            ("vision_tower", self.vision_tower.is_some(), ModelType::Llava),
            ("vision_lora", self.vision_lora.is_some(), ModelType::Llava),
            ("train", !self.train.is_empty(), ModelType::Llava),
            ("mm_projector_type", self.mm_projector_type.is_some(), ModelType::Llava),
            ("vision_feature_layer", self.vision_feature_layer.is_some(), ModelType::Llava),
            ("vqmodel", self.vqmodel.is_some(), ModelType::Chameleon),
            ("z_loss", self.z_loss.is_some(), ModelType::Chameleon),
        ];
        for (key, given, model_type) in keys {
            ensure!(
                !given || model_type == self.model_type,
                "model.{key} is for the type `{}`, model.type is `{}`",
                model_type.name(),
                self.model_type.name()
            );
        }
        Ok(())
    }

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

    fn validate_vora(&self, patch_size: i64) -> Result<()> {
        let image_size = self.image_size;
        ensure!(
            image_size % patch_size == 0,
            "model.image_size is {image_size}, it must be a multiple of model.patch_size, {patch_size}"
        );
        self.token_budget()?;
        let is_tuned = self.lora.as_ref().is_some_and(|lora| lora.r < 0);
        ensure!(
            !is_tuned || self.pretrained.is_some(),
            "model.lora.r is below 0, which attaches no adapters, but model.pretrained names no model to go on from"
        );
        ensure!(
            self.adapters().is_some() || is_tuned || !self.freezes_llm(),
            "model.lora is missing, a VoRA learns to see by its adapters; or set model.freeze_llm=false to train all weights"
        );
        self.refuse_adapters_on_trained_weights()?;
        if let Some(kind) = self.vision_embedding.as_deref() {
            ensure!(
                kind == VISION_EMBEDDING,
                "model.vision_embedding is `{kind}`, only `{VISION_EMBEDDING}` is supported"
            );
        }
        ensure!(
            self.skip_aux_cls != Some(true) || self.aux_vision.is_some(),
            "model.skip_aux_cls is true, but model.aux_vision names no teacher"
        );
        match self.reuse_aux_vision_embedding_layers.as_deref() {
            None | Some("preprocessor") => Ok(()),
            Some(other) => {
                bail!("model.reuse_aux_vision_embedding_layers is `{other}`, it must be `preprocessor` or absent")
            }
        }
    }

    /// The encoder's adapters reach pictures alone, whichever tokens those of the LLM act on.
    fn validate_vision_lora(&self) -> Result<()> {
        let Some(lora) = &self.vision_lora else { return Ok(()) };
        lora.validate().map_err(|error| anyhow!("model.vision_{error}"))?;
        ensure!(
            lora.acts_on == ActsOn::All && lora.answers_on.is_none(),
            "model.vision_lora.acts_on and answers_on are for the LLM's tokens, the encoder sees pictures alone"
        );
        ensure!(
            !self.trains_vision_tower(),
            "model.train has vision_tower and model.vision_lora is given: train the encoder's weights or adapters on them"
        );
        Ok(())
    }

    fn refuse_adapters_on_trained_weights(&self) -> Result<()> {
        ensure!(
            self.lora.is_none() || self.freezes_llm(),
            "model.freeze_llm is false and model.lora is given: train the LLM's weights or adapters on them"
        );
        Ok(())
    }

    fn validate_few_bits(&self) -> Result<()> {
        ensure!(
            !(self.load_in_4bit && self.load_in_8bit),
            "model.load_in_4bit and model.load_in_8bit are both true, the LLM's weights are kept in one of them"
        );
        let Some(key) = self.few_bits_key() else { return Ok(()) };
        match self.model_type {
            ModelType::Chameleon => bail!("{key} is true, but all weights of a Chameleon are trained"),
            ModelType::Own => bail!(
                "{key} is true, but model.type is `own`: a program loads its LLM in few bits itself, by Weights::quantized of \
                 vora-torch"
            ),
            ModelType::Vora | ModelType::Llava => {}
        }
        ensure!(
            self.freezes_llm(),
            "{key} is true and model.freeze_llm is false: only weights that stay frozen can be kept in few bits"
        );
        ensure!(
            self.model_type != ModelType::Vora || self.adapters().is_some(),
            "{key} is true, but model.lora attaches no adapters: a VoRA learns nothing over weights in few bits without them"
        );
        Ok(())
    }

    fn validate_chameleon(&self, vq: &VqTraining) -> Result<()> {
        ensure!(vq.steps >= 1 && vq.batch_size >= 1, "model.vqmodel.steps and batch_size must be at least 1");
        ensure!(vq.learning_rate > 0.0, "model.vqmodel.learning_rate is {}, it must be above 0", vq.learning_rate);
        ensure!(self.z_loss() >= 0.0, "model.z_loss is {}, it must be 0 or more", self.z_loss());
        ensure!(self.freeze_llm != Some(true), "model.freeze_llm is true, but all weights of a Chameleon are trained");
        ensure!(self.lora.is_none(), "model.lora: all weights of a Chameleon are trained, it takes no adapters");
        ensure!(self.pretrained.is_none(), "model.pretrained is not for a Chameleon, which starts from model.llm");
        let stride = vq.config(self.image_size).stride();
        ensure!(
            self.image_size % stride == 0,
            "model.image_size is {}, it must be a multiple of the image tokenizer's stride, {stride}",
            self.image_size
        );
        Ok(())
    }

    /// The coefficient of z-loss: Chameleon's own (section 2.3) where nothing is said.
    pub fn z_loss(&self) -> f64 {
        match self.model_type {
            ModelType::Chameleon => self.z_loss.unwrap_or(1e-5),
            ModelType::Vora | ModelType::Llava | ModelType::Own => 0.0,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overrides::from_yaml;

    const VORA: &str = "{llm: x, patch_size: 14, image_size: 56, lora: {layers: 2, r: 4}}";
    const LLAVA: &str = "{type: llava, llm: x, image_size: 56, vision_tower: y}";

    const CHAMELEON: &str = "{type: chameleon, llm: x, image_size: 56, vqmodel: {}}";

    fn parse(text: &str) -> Result<ModelConfig> {
        let config: ModelConfig = from_yaml(text)?;
        config.validate()?;
        Ok(config)
    }

    #[test]
    fn a_type_takes_its_own_keys() {
        assert_eq!(parse(VORA).unwrap().model_type, ModelType::Vora);
        let llava = parse(&LLAVA.replace('}', ", mm_projector_type: linear, vision_feature_layer: -1}")).unwrap();
        assert_eq!(llava.mm_projector_type, Some(MmProjectorType::Linear));
        assert_eq!(llava.vision_feature_layer, Some(VisionFeatureLayer::One(-1)));
        assert!(llava.freezes_llm() && !llava.trains_vision_tower());
        let adapted = parse(&LLAVA.replace('}', ", vision_lora: {r: 2, lora_alpha: 4}}")).unwrap().vision_lora.unwrap();
        assert_eq!((adapted.scaling(), adapted.target_modules), (2.0, vec![ALL_LINEAR.to_owned()]));
        assert!(parse(&LLAVA.replace('}', ", train: [vision_tower]}")).unwrap().trains_vision_tower());
        let chameleon = parse(CHAMELEON).unwrap();
        assert_eq!((chameleon.z_loss(), llava.z_loss()), (1e-5, 0.0));
        let vq = chameleon.vqmodel.unwrap().config(56);
        // transformers 5 takes a word there, and no null.
        assert_eq!((vq.stride(), vq.attn_type.as_deref()), (8, Some("none")));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let lora = ", lora: {layers: 2, r: 4}";
        let cases = [
            (LLAVA.replace('}', ", patch_size: 14}"), "model.patch_size is for the type `vora`, model.type is `llava`"),
            (VORA.replace("llm: x", "llm: x, freeze_llm: false"), "model.freeze_llm is false and model.lora is given"),
            (CHAMELEON.replace("llm: x", "llm: x, freeze_llm: true"), "all weights of a Chameleon are trained"),
            (LLAVA.replace(", vision_tower: y", ""), "model.vision_tower is missing"),
            (
                LLAVA.replace("vision_tower: y", &format!("vision_tower: y, freeze_llm: false{lora}")),
                "model.freeze_llm",
            ),
            (VORA.replace(lora, ""), "model.lora is missing"),
            (VORA.replace("patch_size: 14, ", ""), "model.patch_size is missing"),
            (VORA.replace("image_size: 56", "image_size: 0"), "model.image_size is 0"),
            (VORA.replace("llm: x", "llm: x, max_image_tokens: 0"), "model.max_image_tokens is 0"),
            (
                VORA.replace("llm: x", "llm: x, max_image_tokens: 4, min_image_tokens: 9"),
                "more than max_image_tokens, 4",
            ),
            (VORA.replace("llm: x", "llm: x, min_image_tokens: 9"), "without model.max_image_tokens"),
            (
                VORA.replace("llm: x", "llm: x, max_image_tokens: 4, image_aspect_ratio: pad"),
                "with model.max_image_tokens pictures keep their shape",
            ),
            (LLAVA.replace("llm: x", "llm: x, max_image_tokens: 4"), "model.max_image_tokens is for the type `vora`"),
            (LLAVA.replace("llava", "flamingo"), "flamingo"),
            (CHAMELEON.replace("56", "60"), "a multiple of the image tokenizer's stride, 8"),
            (CHAMELEON.replace("vqmodel: {}", "z_loss: 0"), "model.vqmodel is missing"),
            (CHAMELEON.replace("{}", "{code: 1}"), "unknown field `code`"),
            (CHAMELEON.replace("vqmodel", &format!("{}, vqmodel", &lora[2..])), "it takes no adapters"),
            (LLAVA.replace('}', ", mm_projector_type: pool}"), "pool"),
            (LLAVA.replace('}', ", vision_lora: {r: 0}}"), "model.vision_lora.r is 0, it must be at least 1"),
            (LLAVA.replace('}', ", vision_lora: {rank: 2}}"), "unknown field `rank`"),
            (LLAVA.replace('}', ", vision_lora: {r: 2, acts_on: with_image}}"), "the encoder sees pictures alone"),
            (LLAVA.replace('}', ", vision_lora: {r: 2}, train: [vision_tower]}"), "weights or adapters on them"),
            (LLAVA.replace('}', ", train: [llm]}"), "unknown variant `llm`, expected one of vision_tower"),
            (VORA.replace("llm: x", "llm: x, vision_lora: {r: 2}"), "model.vision_lora is for the type `llava`"),
            (VORA.replace("llm: x", "llm: x, train: [vision_tower]"), "model.train is for the type `llava`"),
            (VORA.replace("llm: x", "llm: x, load_in_4bit: true, load_in_8bit: true"), "load_in_8bit are both true"),
            (CHAMELEON.replace("llm: x", "llm: x, load_in_4bit: true"), "all weights of a Chameleon are trained"),
            (
                LLAVA.replace("llm: x", "llm: x, load_in_8bit: true, freeze_llm: false"),
                "model.load_in_8bit is true and model.freeze_llm is false",
            ),
            (
                VORA.replace("r: 4", "r: -1").replace("llm: x", "llm: x, load_in_4bit: true, pretrained: y"),
                "model.load_in_4bit is true, but model.lora attaches no adapters",
            ),
            (
                "{type: own, llm: x, image_size: 56, load_in_4bit: true}".to_owned(),
                "by Weights::quantized of vora-torch",
            ),
        ];
        for (text, expected) in cases {
            let error = format!("{:#}", parse(&text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn few_bits_are_one_key_each() {
        let of = |keys: &str| parse(&VORA.replace("llm: x", &format!("llm: x{keys}"))).unwrap().few_bits_key();
        assert_eq!(of(", load_in_4bit: true"), Some("model.load_in_4bit"));
        assert_eq!(of(", load_in_8bit: true, load_in_4bit: false"), Some("model.load_in_8bit"));
        assert_eq!(of(""), None);
        let projector_alone = LLAVA.replace("llm: x", "llm: x, load_in_4bit: true");
        assert!(parse(&projector_alone).unwrap().load_in_4bit);
        // A run file without them stays as it was.
        assert!(!serde_json::to_string(&parse(VORA).unwrap()).unwrap().contains("load_in"));
    }

    #[test]
    fn a_model_of_a_programs_own_has_its_own_parts() {
        let own = parse("{type: own, llm: x, image_size: 56, lora: {layers: 2, r: 4}}").unwrap();
        assert!(!own.model_type.lacks("llm") && !own.model_type.lacks("stem"));
        let error = own.way().unwrap_err().to_string();
        assert!(error.contains("model.type is `own`") && error.contains("Student::from_parts"), "{error}");
        let error = parse("{type: own, llm: x, image_size: 56, patch_size: 14}").unwrap_err().to_string();
        assert!(error.contains("model.patch_size is for the type `vora`"), "{error}");
    }

    /// Made in code, a section is refused as one in a file is.
    #[test]
    fn what_code_leaves_out_is_named() {
        let error = |config: ModelConfig| config.validate().unwrap_err().to_string();
        assert_eq!(error(ModelConfig::default()), "model.llm is empty, it takes a folder or a name on the hub");
        let llm = || "x".to_owned();
        assert!(error(ModelConfig { llm: llm(), ..Default::default() }).starts_with("model.image_size is 0"));
        let config = ModelConfig { llm: llm(), image_size: 56, ..Default::default() };
        assert!(error(config.clone()).starts_with("model.patch_size is missing"));
        let lora = Some(LoraConfig::new(4, 2));
        ModelConfig { patch_size: Some(14), lora, ..config }.validate().unwrap();
    }

    #[test]
    fn a_part_of_another_type_is_known_as_such() {
        assert!(ModelType::Llava.lacks("vision_embedding.patchifier.proj"));
        assert!(ModelType::Vora.lacks("multi_modal_projector"));
        assert!(!ModelType::Vora.lacks("vision_embedding") && !ModelType::Vora.lacks("lora_C"));
    }
}
