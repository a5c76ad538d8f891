//! Vision as LoRA (arXiv 2503.20680): patches among word embeddings, one decoder for both.

use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use vora_llm::{CausalLm, VisionAttention};
use vora_torch::weights::{Init, Weights};

use super::{VisionEmbedding, VoraConfig};
use crate::adapted::{AdaptedLlm, under};
use crate::few_bits::describe;
use crate::model::VisionLanguageModel;

/// An LLM with eyes: a decoder whose first blocks may carry adapters, and one patch embedding.
#[derive(Debug)]
pub struct Vora {
    config: VoraConfig, // but for `llm` and `lora`, which `llm` knows
    llm: AdaptedLlm,
    vision_embedding: VisionEmbedding,
}

impl Vora {
    /// Takes `llm.*` and `vision_embedding.*` from one source, as a VoRA folder has them. Adapters that the config
    /// names are attached and taken from the same source.
    ///
    /// # Errors
    /// Names the key of the config that does not fit; tensors that do not fit are told by [`Weights::finish_allowing`].
    pub fn load(config: VoraConfig, weights: &Weights) -> Result<Self> {
        Self::assemble(config, &weights.pp("llm"), weights)
    }

    /// Builds a VoRA from an LLM's own folder: frozen weights from `llm`, everything trained (adapters and patch
    /// embedding) from `trained`.
    ///
    /// # Errors
    /// As [`Vora::load`].
    pub fn assemble(mut config: VoraConfig, llm_weights: &Weights, trained: &Weights) -> Result<Self> {
        let lora = config.lora.take();
        let mut model = Self {
            llm: AdaptedLlm::new(CausalLm::load(&config.llm, llm_weights)?),
            vision_embedding: VisionEmbedding::load(&config, &trained.pp("vision_embedding"))?,
            config,
        };
        if let Some(lora) = lora {
            model.attach("default", &lora, &trained.pp("llm"))?;
        }
        model.attach_biases(llm_weights, &trained.pp("llm"))?;
        Ok(model)
    }

    /// Puts the biases of the config on the linears that have none: frozen ones where the weights' source has them and
    /// no adapter is apart from them, else trained ones. A folder in which no layer has one is one without them.
    fn attach_biases(&mut self, llm: &Weights, trained: &Weights) -> Result<()> {
        if self.config.biases.is_none() {
            return Ok(());
        }
        let is_merged = self.lora().is_none();
        let mut wanted = Vec::new();
        self.llm().linears(&mut |path, _| {
            wanted.extend(self.config.has_layer_bias(&format!("{path}.bias")).then(|| path.to_owned()));
            Ok(())
        })?;
        let has = |weights: &Weights| wanted.iter().any(|path| weights.pp(path).contains("bias"));
        if !has(llm) && !has(trained) {
            self.config.biases = None;
            return Ok(());
        }
        let from_llm = is_merged && has(llm);
        self.llm_mut().linears_mut(&mut |path, linear| {
            if wanted.iter().any(|wanted| wanted == path) {
                let shape = [linear.out_features()];
                linear.set_bias(if from_llm {
                    llm.pp(path).get("bias", &shape, Init::Zeros)?
                } else {
                    trained.pp(path).parameter("bias", &shape, Init::Zeros)?
                });
            }
            Ok(())
        })
    }

    /// Opens a folder that [`Vora::save`](VisionLanguageModel::save) wrote, merged or not.
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = VoraConfig::open(folder)?;
        let weights = Weights::open(folder, device, kind)?;
        let model = Self::load(config, &weights)?;
        // The teacher's heads have done their work once a model runs.
        weights.finish_allowing(|name| name.starts_with("aux_vision."))?;
        Ok(model)
    }

    /// What it is made of.
    pub fn config(&self) -> VoraConfig {
        VoraConfig { llm: self.llm().config().clone(), lora: self.lora().cloned(), ..self.config.clone() }
    }

    /// What its pictures go through.
    pub fn vision_embedding(&self) -> &VisionEmbedding {
        &self.vision_embedding
    }
}

impl VisionLanguageModel for Vora {
    fn adapted(&self) -> &AdaptedLlm {
        &self.llm
    }

    fn adapted_mut(&mut self) -> &mut AdaptedLlm {
        &mut self.llm
    }

    fn vision_attention(&self) -> VisionAttention {
        self.config.vision_attention
    }

    /// # Errors
    /// See [`VisionEmbedding::grid`].
    fn image_grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        self.vision_embedding.grid(height, width)
    }

    fn image_features(&self, pixel_values: &Tensor) -> Tensor {
        self.vision_embedding.forward(pixel_values)
    }

    fn llm_prefix(&self) -> &'static str {
        "llm."
    }

    fn config_json(&self) -> Result<Value> {
        let mut json = self.config().to_json()?;
        describe(&self.llm, &mut json);
        Ok(json)
    }

    /// # Errors
    /// Where adapters are still apart from the weights, and where layers have biases that no such LLM has.
    fn plain_llm(&self) -> Result<&CausalLm> {
        let llm = self.llm.merged()?;
        ensure!(
            self.config.biases.is_none(),
            "the LLM has biases from layers with adapters, for which a {} has no place; it runs as a VoRA",
            llm.config().model_type
        );
        Ok(llm)
    }

    /// The layout of the published VoRA models, with adapters beside their weights.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = under(self.llm_prefix(), self.llm().stored()?);
        tensors.extend(under("vision_embedding.", self.vision_embedding.tensors()));
        tensors.extend(under(self.llm_prefix(), self.llm.adapter_tensors()?));
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_llm::LlmConfig;
    use vora_lora::LoraConfig;
    use vora_text::{Piece, Span, Spans};
    use vora_torch::checkpoint::save;
    use vora_vision::PositionTable;

    use crate::model::Input;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// A tiny VoRA with adapters whose B is not zero.
    fn adapted() -> Vora {
        let mut config = VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8);
        config.lora = Some(LoraConfig::new(3, 1));
        let weights = Weights::random(5, Device::Cpu, Kind::Float);
        let model = Vora::load(config, &weights).unwrap();
        for (name, tensor) in weights.parameters() {
            if name.contains("lora_B") {
                tch::no_grad(|| tensor.shallow_clone().copy_(&(Tensor::ones_like(&tensor) * 0.05)));
            }
        }
        model
    }

    #[test]
    fn what_is_not_finite_is_not_merged() {
        let mut model = adapted();
        let hidden = |model: &Vora| tch::no_grad(|| model.forward(&input(), 0)).unwrap().last_hidden_state;
        let before = hidden(&model);
        let mut broken = None;
        model
            .llm_mut()
            .linears_mut(&mut |path, linear| {
                if path.ends_with("mlp.up_proj") && broken.is_none() {
                    let b = linear.adapters().next().expect("an adapter").lora_b().shallow_clone();
                    broken = Some(b.detach().copy());
                    let _ = tch::no_grad(|| b.get(0).get(0).fill_(f64::NAN));
                }
                Ok(())
            })
            .unwrap();
        let error = format!("{:#}", model.merge().unwrap_err());
        assert!(error.contains("cannot merge: model.layers.0.mlp.up_proj: lora_B of the adapter"), "{error}");
        // Nothing was merged: with the number mended the model is what it was.
        model
            .llm_mut()
            .linears_mut(&mut |path, linear| {
                if path.ends_with("mlp.up_proj")
                    && let Some(b) = broken.take()
                {
                    tch::no_grad(|| linear.adapters().next().expect("still apart").lora_b().shallow_clone().copy_(&b));
                }
                Ok(())
            })
            .unwrap();
        assert!(hidden(&model).equal(&before) && model.lora().is_some());
    }

    fn input() -> Input {
        Input::new(
            Tensor::arange(9, (Kind::Int64, Device::Cpu)).unsqueeze(0),
            vec![Tensor::linspace(-1, 1, 3 * 8 * 8, CPU).view([3, 8, 8])],
            Spans::new(vec![vec![Span::text(2), Span::image(2, 2), Span::text(3)]]),
        )
    }

    fn logits(model: &Vora) -> Tensor {
        let output = tch::no_grad(|| model.forward(&input(), 0)).unwrap();
        model.llm().logits(&output.last_hidden_state.flatten(0, 1)).detach()
    }

    #[test]
    fn saved_models_open_again_merged_or_not() {
        let mut model = adapted();
        let expected = logits(&model);
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str| Vora::open(&folder.path().join(name), Device::Cpu, Kind::Float).unwrap();
        model.save(&folder.path().join("adapted")).unwrap();
        assert!(logits(&open("adapted")).equal(&expected));
        assert_eq!(open("adapted").config().lora, Some(LoraConfig::new(3, 1)));
        assert!(model.save_llm(&folder.path().join("llm")).unwrap_err().to_string().contains("merge first"));

        model.merge().unwrap();
        model.save(&folder.path().join("merged")).unwrap();
        let merged = open("merged");
        assert_eq!(merged.config().lora, None);
        fixtures::assert_close_to(&logits(&merged), &expected, 1e-5);
        model.save_llm(&folder.path().join("llm")).unwrap();
        let weights = Weights::open(&folder.path().join("llm"), Device::Cpu, Kind::Float).unwrap();
        CausalLm::load(&LlmConfig::open(&folder.path().join("llm")).unwrap(), &weights).unwrap();
        weights.finish().unwrap();
    }

    /// DoRA's lengths of rows lie beside the pair that they belong to.
    #[test]
    fn a_magnitude_is_saved_with_its_adapter() {
        let plain = adapted();
        let mut tensors = plain.tensors().unwrap();
        let name = "llm.model.layers.0.mlp.up_proj.lora_magnitude_vector";
        let rows = plain.config().llm.intermediate_size;
        tensors.push((name.to_owned(), Tensor::linspace(0.5, 2.0, rows, CPU)));
        let weights = Weights::from_tensors(tensors, Device::Cpu, Kind::Float);
        let mut dora = Vora::load(plain.config(), &weights).unwrap();
        weights.finish().unwrap();
        let expected = logits(&dora);
        assert!((&expected - logits(&plain)).abs().max().double_value(&[]) > 1e-2);
        let folder = tempfile::tempdir().unwrap();
        dora.save(folder.path()).unwrap();
        assert!(logits(&Vora::open(folder.path(), Device::Cpu, Kind::Float).unwrap()).equal(&expected));

        dora.llm()
            .linears(&mut |_, linear| {
                for magnitude in linear.adapters().filter_map(|adapter| adapter.magnitude()) {
                    let _ = tch::no_grad(|| magnitude.get(0).fill_(f64::NAN));
                }
                Ok(())
            })
            .unwrap();
        let error = format!("{:#}", dora.merge().unwrap_err());
        assert!(error.contains("layers.0.mlp.up_proj: lora_magnitude_vector of the adapter"), "{error}");
    }

    #[test]
    fn a_folder_says_whether_it_sees_as_the_published_code_does() {
        let mut config = VoraConfig::new(LlmConfig::tiny(64), 12, 4, 8);
        let folder = tempfile::tempdir().unwrap();
        let mut open = |mask, pos_embed| {
            (config.vision_attention, config.pos_embed) = (mask, pos_embed);
            let weights = Weights::random(5, Device::Cpu, Kind::Float);
            Vora::load(config.clone(), &weights).unwrap().save(folder.path()).unwrap();
            Vora::open(folder.path(), Device::Cpu, Kind::Float).unwrap()
        };
        let ours = open(VisionAttention::Bidirectional, PositionTable::Interpolated);
        let fused = open(VisionAttention::BidirectionalFused, PositionTable::Interpolated);
        let flat = open(VisionAttention::Bidirectional, PositionTable::FirstRows);
        // Two pictures side by side, each with its own size of grid.
        let picture = |width: i64| Tensor::linspace(-1, 1, 3 * 4 * width, CPU).view([3, 4, width]);
        let input = Input::new(
            Tensor::arange(5, (Kind::Int64, Device::Cpu)).unsqueeze(0),
            vec![picture(8), picture(4)],
            Spans::new(vec![vec![Span::text(1), Span::image(1, 2), Span::image(1, 1), Span::text(1)]]),
        );
        let hidden = |model: &Vora| tch::no_grad(|| model.forward(&input, 0)).unwrap().last_hidden_state;
        let differs = |a: &Tensor, b: &Tensor, place| (a - b).select(1, place).abs().max().double_value(&[]) > 1e-4;
        // The word before sees neither; the first picture sees the second only where they are one block.
        let [ours, fused, flat] = [&ours, &fused, &flat].map(hidden);
        assert_eq!([0, 1, 2].map(|place| differs(&ours, &fused, place)), [false, true, true]);
        assert_eq!([0, 1, 2].map(|place| differs(&ours, &flat, place)), [false, true, true]);
    }

    #[test]
    fn a_folder_that_does_not_fit_is_told_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut model = adapted();
        model.merge().unwrap();
        model.save(folder.path()).unwrap();
        let mut tensors = model.tensors().unwrap();
        tensors.retain(|(name, _)| name != "vision_embedding.pos_embed");
        tensors.push(("llm.extra".into(), Tensor::zeros([1], CPU)));
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let error = Vora::open(folder.path(), Device::Cpu, Kind::Float).unwrap_err().to_string();
        assert!(error.contains("missing    vision_embedding.pos_embed"), "{error}");
        assert!(error.contains("unexpected llm.extra"), "{error}");
    }

    #[test]
    fn pictures_and_places_must_agree() {
        let model = adapted();
        let error = |change: &dyn Fn(&mut Input)| {
            let mut input = input();
            change(&mut input);
            model.embed(&input).unwrap_err().to_string()
        };
        assert!(error(&|i| i.pixel_values.clear()).contains("no picture"));
        assert!(error(&|i| i.pixel_values.push(Tensor::zeros([3, 8, 8], CPU))).contains("make 8 tokens"));
        assert!(error(&|i| i.spans = Spans::text(&[9])).contains("no place"));
        assert!(error(&|i| i.pixel_values = vec![Tensor::zeros([3, 8, 7], CPU)]).contains("does not divide"));
        let error_of_one = error(&|i| i.pixel_values = vec![Tensor::zeros([1, 8, 8], CPU)]);
        assert_eq!(error_of_one, "a picture is [1, 8, 8], it must be [3, height, width]");
        let text = Piece::Text { ids: vec![1], supervised: false };
        let error = Input::prompt(&[text, Piece::Image], Vec::new(), &model).unwrap_err().to_string();
        assert_eq!(error, "0 pictures for 1 image places");
    }
}
