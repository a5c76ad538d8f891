//! What the types of a run file's `model` leave open.

use anyhow::{Result, anyhow, bail, ensure};
use vora_lora::ActsOn;

use vora_model::VisionEmbeddingType;

use super::config::{ImageAspectRatio, ModelConfig, TrainedPart};
use super::model_type::ModelType;
use super::vq::VqTraining;
use super::way::Way;

impl ModelConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the key.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.llm.is_empty(), "model.llm is empty, it takes a folder or a name on the hub");
        self.refuse_keys_of_other_types()?;
        ensure!(
            self.image_size >= i64::from(self.model_type != ModelType::Gemma4Unified),
            "model.image_size is {} or missing, it is the side of a picture in pixels, at least 1",
            self.image_size
        );
        let at_least_one = [
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
            Way::Gemma4Unified => self.validate_gemma4(),
        }
    }

    fn refuse_keys_of_other_types(&self) -> Result<()> {
        use ModelType::{Chameleon, Gemma4Unified, Llava, Vora};
        let keys: [(&str, bool, &[ModelType]); 19] = [
            ("vision_embedding", self.vision_embedding.is_some(), &[Vora]),
            ("vision_embedding_intermediate_size", self.vision_embedding_intermediate_size.is_some(), &[Vora]),
            ("patch_size", self.patch_size.is_some(), &[Vora]),
            ("max_image_tokens", self.max_image_tokens.is_some(), &[Vora, Gemma4Unified]),
            ("min_image_tokens", self.min_image_tokens.is_some(), &[Vora]),
            ("aux_vision", self.aux_vision.is_some(), &[Vora, Gemma4Unified]),
            ("skip_aux_cls", self.skip_aux_cls.is_some(), &[Vora]),
            ("reuse_aux_vision_embedding_layers", self.reuse_aux_vision_embedding_layers.is_some(), &[Vora]),
            ("reuse_aux_vision_start", self.reuse_aux_vision_start.is_some(), &[Vora]),
            ("vision_attention", self.vision_attention.is_some(), &[Vora]),
            ("fuse_adjacent_images", self.fuse_adjacent_images.is_some(), &[Vora]),
            ("pos_embed", self.pos_embed.is_some(), &[Vora]),
            ("vision_tower", self.vision_tower.is_some(), &[Llava]),
            ("vision_lora", self.vision_lora.is_some(), &[Llava]),
            ("train", !self.train.is_empty(), &[Llava, Gemma4Unified]),
            ("mm_projector_type", self.mm_projector_type.is_some(), &[Llava]),
            ("vision_feature_layer", self.vision_feature_layer.is_some(), &[Llava]),
            ("vqmodel", self.vqmodel.is_some(), &[Chameleon]),
            ("z_loss", self.z_loss.is_some(), &[Chameleon]),
        ];
        for (key, given, types) in keys {
            let named = types.iter().map(|of| format!("`{}`", of.name())).collect::<Vec<_>>().join(" or ");
            ensure!(
                !given || types.contains(&self.model_type),
                "model.{key} is for the type {named}, model.type is `{}`",
                self.model_type.name()
            );
        }
        let (part, of) = match self.model_type {
            Gemma4Unified => {
                (TrainedPart::VisionTower, "vision_tower, which is a LLaVA's; a Gemma 4 Unified's is vision_embedder")
            }
            _ => (
                TrainedPart::VisionEmbedder,
                "vision_embedder, which is a Gemma 4 Unified's; a LLaVA's is vision_tower",
            ),
        };
        ensure!(!self.train.contains(&part), "model.train has {of}");
        Ok(())
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
        if self.vision_embedding == Some(VisionEmbeddingType::Gemma4Unified) {
            for (key, given) in [
                ("pos_embed", self.pos_embed.is_some()),
                ("reuse_aux_vision_embedding_layers", self.reuse_aux_vision_embedding_layers.is_some()),
                ("reuse_aux_vision_start", self.reuse_aux_vision_start.is_some()),
            ] {
                ensure!(
                    !given,
                    "model.{key} is for AIMv2Embedding; model.vision_embedding is gemma4_unified, which has positions by column \
                     and row and nothing of a teacher's"
                );
            }
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
            ModelType::Vora | ModelType::Llava | ModelType::Gemma4Unified => {}
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

    fn validate_gemma4(&self) -> Result<()> {
        ensure!(
            self.image_aspect_ratio.is_none() && self.background_color.is_none(),
            "model.image_aspect_ratio and background_color make squares, pictures keep their shape in a Gemma 4 Unified"
        );
        ensure!(
            self.freezes_llm(),
            "model.freeze_llm is false, but a Gemma 4 Unified is taught by adapters (model.lora) and by what it sees through \
             (model.train: [vision_embedder])"
        );
        ensure!(
            self.pretrained.is_none(),
            "model.pretrained is not for a Gemma 4 Unified: to go on from a run, merge it and name that folder as model.llm"
        );
        ensure!(
            self.adapters().is_some() || self.trains_vision_embedder(),
            "nothing is trained: a Gemma 4 Unified takes model.lora, model.train: [vision_embedder] or both"
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
}

#[cfg(test)]
mod tests {
    use vora_lora::LoraConfig;
    use vora_model::{ALL_LINEAR, MmProjectorType};
    use vora_vision::VisionFeatureLayer;

    use super::*;
    use crate::overrides::from_yaml;

    const VORA: &str = "{llm: x, patch_size: 14, image_size: 56, lora: {layers: 2, r: 4}}";
    const LLAVA: &str = "{type: llava, llm: x, image_size: 56, vision_tower: y}";

    const GEMMA4: &str = "{type: gemma4_unified, llm: x, lora: {r: 4, target_modules: [q_proj]}}";
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
        let gemma =
            parse(&GEMMA4.replace("llm: x", "llm: x, train: [vision_embedder], max_image_tokens: 280")).unwrap();
        assert!(gemma.trains_vision_embedder() && gemma.keeps_shape() && gemma.model_type == ModelType::Gemma4Unified);
        assert!(parse("{type: gemma4_unified, llm: x, train: [vision_embedder]}").unwrap().adapters().is_none());
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
            (
                LLAVA.replace("llm: x", "llm: x, max_image_tokens: 4"),
                "model.max_image_tokens is for the type `vora` or",
            ),
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
            (
                VORA.replace("llm: x", "llm: x, train: [vision_tower]"),
                "model.train is for the type `llava` or `gemma4_unified`",
            ),
            (LLAVA.replace('}', ", train: [vision_embedder]}"), "model.train has vision_embedder, which is a Gemma 4"),
            (
                GEMMA4.replace("llm: x", "llm: x, train: [vision_tower]"),
                "model.train has vision_tower, which is a LLaVA's",
            ),
            (GEMMA4.replace("llm: x", "llm: x, patch_size: 14"), "model.patch_size is for the type `vora`"),
            (GEMMA4.replace("llm: x", "llm: x, min_image_tokens: 4"), "model.min_image_tokens is for the type `vora`"),
            (GEMMA4.replace("llm: x", "llm: x, vision_tower: y"), "model.vision_tower is for the type `llava`"),
            (GEMMA4.replace("llm: x", "llm: x, image_aspect_ratio: pad"), "pictures keep their shape"),
            (GEMMA4.replace("llm: x", "llm: x, freeze_llm: false"), "a Gemma 4 Unified is taught by adapters"),
            (GEMMA4.replace("llm: x", "llm: x, pretrained: y"), "merge it and name that folder as model.llm"),
            (GEMMA4.replace("r: 4", "r: -1"), "nothing is trained"),
            (GEMMA4.replace("llm: x", "llm: x, image_size: -1"), "model.image_size is -1"),
            (VORA.replace(", image_size: 56", ""), "model.image_size is 0 or missing"),
            (
                VORA.replace("llm: x", "llm: x, vision_embedding: gemma4_unified, pos_embed: interpolate"),
                "model.pos_embed is for AIMv2Embedding",
            ),
            (
                VORA.replace(
                    "llm: x",
                    "llm: x, vision_embedding: gemma4_unified, aux_vision: y, reuse_aux_vision_embedding_layers: preprocessor",
                ),
                "model.reuse_aux_vision_embedding_layers is for AIMv2Embedding",
            ),
            (
                VORA.replace("llm: x", "llm: x, vision_embedding: CLIP"),
                "unknown variant `CLIP`, expected one of AIMv2Embedding, gemma4_unified",
            ),
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
        assert!(ModelType::Gemma4Unified.lacks("vision_embedding") && !ModelType::Gemma4Unified.lacks("model"));
        assert!(ModelType::Vora.lacks("multi_modal_projector"));
        assert!(!ModelType::Vora.lacks("vision_embedding") && !ModelType::Vora.lacks("lora_C"));
    }
}
