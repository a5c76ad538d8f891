//! Vision as LoRA (arXiv 2503.20680): patches among word embeddings, one decoder for both.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_llm::chat::Piece;
use vora_llm::{AttentionPlan, CausalLm, Output, Span, Spans};
use vora_lora::{LoraConfig, attach_all};
use vora_torch::safetensors::{save, write_atomically};
use vora_torch::weights::Weights;
use vora_vision::PatchEmbed;

use crate::VoraConfig;

/// One batch, as the model takes it.
#[derive(Debug)]
pub struct Input {
    /// `[batch, seq]`; what stands at image places is not read.
    pub input_ids: Tensor,
    /// The pictures in the order of their places in the batch, each `[3, height, width]`.
    pub pixel_values: Vec<Tensor>,
    /// Which tokens are text and which are pictures, row by row.
    pub spans: Spans,
}

impl Input {
    /// One prompt: text and image places in order, with a picture `[3, height, width]` for each place.
    ///
    /// # Errors
    /// Where pictures and places differ in number, or a picture is not a whole number of patches.
    pub fn prompt(pieces: &[Piece], pixel_values: Vec<Tensor>, model: &Vora) -> Result<Self> {
        let places = pieces.iter().filter(|piece| matches!(piece, Piece::Image)).count();
        ensure!(places == pixel_values.len(), "{} pictures for {places} image places", pixel_values.len());
        let mut pictures = pixel_values.iter();
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Text { ids: text, .. } if text.is_empty() => {}
                Piece::Text { ids: text, .. } => {
                    ids.extend_from_slice(text);
                    spans.push(Span::text(text.len() as i64));
                }
                Piece::Image => {
                    let (_, height, width) = pictures.next().context("a place without a picture")?.size3()?;
                    let (rows, cols) = model.vision_embedding.grid(height, width)?;
                    ids.resize(ids.len() + (rows * cols) as usize, 0);
                    spans.push(Span::image(rows, cols));
                }
            }
        }
        let input_ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(model.llm.device());
        let pixel_values = pixel_values.into_iter().map(|p| p.to_device(model.llm.device())).collect();
        Ok(Self { input_ids, pixel_values, spans: Spans { rows: vec![spans] } })
    }
}

/// An LLM with eyes: a decoder whose first blocks may carry adapters, and one patch embedding.
#[derive(Debug)]
pub struct Vora {
    config: VoraConfig,
    llm: CausalLm,
    vision_embedding: PatchEmbed,
}

impl Vora {
    /// Takes `llm.*` and `vision_embedding.*` from one source, as a VoRA folder has them. Adapters that the config
    /// names are attached and taken from the same source.
    pub fn load(config: VoraConfig, weights: &Weights) -> Result<Self> {
        Self::assemble(config, &weights.pp("llm"), weights)
    }

    /// Builds a VoRA from an LLM's own folder: frozen weights from `llm`, everything trained (adapters and patch
    /// embedding) from `trained`.
    pub fn assemble(config: VoraConfig, llm: &Weights, trained: &Weights) -> Result<Self> {
        let mut model = Self {
            llm: CausalLm::load(&config.llm, llm)?,
            vision_embedding: PatchEmbed::load(&config.patch_embed(), &trained.pp("vision_embedding"))?
                .with_rms_norm_eps(config.llm.rms_norm_eps),
            config,
        };
        if let Some(lora) = model.config.lora.clone() {
            model.attach("default", &lora, &trained.pp("llm"))?;
        }
        Ok(model)
    }

    /// Opens a folder that [`Vora::save`] wrote, merged or not.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = VoraConfig::open(folder)?;
        let weights = Weights::open(folder, device, kind)?;
        let model = Self::load(config, &weights)?;
        // The teacher's heads have done their work once a model runs.
        weights.finish_allowing(|name| name.starts_with("aux_vision."))?;
        Ok(model)
    }

    /// Puts a named adapter on the linear layers that `lora` asks for; its tensors stand at their layers' names.
    ///
    /// # Errors
    /// See [`attach_all`].
    pub fn attach(&mut self, name: &str, lora: &LoraConfig, weights: &Weights) -> Result<()> {
        let layers = weights.pp("model.layers");
        attach_all(name, lora, &layers, |visit| self.llm.linears_mut(visit))?;
        self.config.lora = Some(lora.clone());
        Ok(())
    }

    /// Folds every adapter into its layer's weight: in f32, rounded once. None is left.
    pub fn merge(&mut self) -> Result<()> {
        self.llm.linears_mut(&mut |_, _, linear| {
            linear.merge();
            Ok(())
        })?;
        self.config.lora = None;
        Ok(())
    }

    /// What it is made of.
    pub fn config(&self) -> &VoraConfig {
        &self.config
    }

    /// The decoder.
    pub fn llm(&self) -> &CausalLm {
        &self.llm
    }

    /// The patch embedding.
    pub fn vision_embedding(&self) -> &PatchEmbed {
        &self.vision_embedding
    }

    /// The word embeddings with the pictures' patches in their places, `[batch, seq, hidden]`.
    pub fn embed(&self, input: &Input) -> Result<Tensor> {
        let (batch, seq) = input.input_ids.size2()?;
        let device = input.input_ids.device();
        let places = input.spans.image_positions();
        if places.is_empty() {
            ensure!(input.pixel_values.is_empty(), "{} pictures and no place for one", input.pixel_values.len());
            return Ok(self.llm.embed(&input.input_ids));
        }
        let patches = self.patches(&input.pixel_values)?; // [image tokens, hidden]
        ensure!(
            patches.size()[0] == places.len() as i64,
            "the pictures make {} patches, the text has places for {}",
            patches.size()[0],
            places.len()
        );
        let places = Tensor::from_slice(&places).to_device(device);
        let ids = input.input_ids.view([-1]).index_fill(0, &places, 0);
        let words = self.llm.embed(&ids); // [batch * seq, hidden]
        Ok(words.index_copy(0, &places, &patches).view([batch, seq, -1]))
    }

    /// All patches of all pictures, one after the other, `[image tokens, hidden]`; pictures of one size that follow
    /// each other are embedded together.
    fn patches(&self, pixel_values: &[Tensor]) -> Result<Tensor> {
        let mut rows = Vec::new();
        for group in pixel_values.chunk_by(|a, b| a.size() == b.size()) {
            let patches = self.vision_embedding.forward(&Tensor::stack(group, 0)); // [pictures, patches, hidden]
            rows.push(patches.flatten(0, 1));
        }
        ensure!(!rows.is_empty(), "a place for a picture, and no picture");
        Ok(Tensor::cat(&rows, 0))
    }

    /// How attention goes over these spans; made once a batch.
    pub fn plan(&self, spans: &Spans) -> Result<AttentionPlan> {
        AttentionPlan::new(spans, self.config.vision_attention, self.llm.device(), self.llm.kind())
    }

    /// Runs the decoder over a batch; keeps the hidden states of the first `hidden_layers` blocks.
    pub fn forward(&self, input: &Input, hidden_layers: usize) -> Result<Output> {
        let plan = self.plan(&input.spans)?;
        Ok(self.llm.forward(&self.embed(input)?, &plan, hidden_layers))
    }

    /// Every tensor by its name in a VoRA folder; adapters, where they are attached, stand beside their weights.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let llm = self.llm.tensors().into_iter().map(|(name, t)| (format!("llm.{name}"), t));
        let vision =
            self.vision_embedding.tensors().into_iter().map(|(name, t)| (format!("vision_embedding.{name}"), t));
        let mut tensors: Vec<_> = llm.chain(vision).collect();
        self.llm.linears(&mut |layer_idx, module, linear| {
            for adapter in linear.adapters() {
                let path = format!("llm.model.layers.{layer_idx}.{module}");
                tensors.push((format!("{path}.lora_A.weight"), adapter.lora_a().shallow_clone()));
                tensors.push((format!("{path}.lora_B.weight"), adapter.lora_b().shallow_clone()));
            }
            Ok(())
        })?;
        Ok(tensors)
    }

    /// Writes `config.json` and `model.safetensors` in the layout of the published VoRA models.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        save(&folder.join("model.safetensors"), &self.tensors()?, &[])?;
        write_json(&folder.join("config.json"), &self.config.to_json()?)
    }

    /// Writes the LLM alone as a plain checkpoint, without pictures, for any tool that reads one.
    pub fn save_llm(&self, folder: &Path) -> Result<()> {
        ensure!(self.config.lora.is_none(), "the adapters are still apart from the weights: merge first");
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        save(&folder.join("model.safetensors"), &self.llm.tensors(), &[])?;
        write_json(&folder.join("config.json"), &serde_json::to_value(&self.config.llm)?)
    }
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(json)?;
    write_atomically(path, |file| Ok(std::io::Write::write_all(file, text.as_bytes())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vora_llm::LlmConfig;

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

    fn input() -> Input {
        Input {
            input_ids: Tensor::arange(9, (Kind::Int64, Device::Cpu)).unsqueeze(0),
            pixel_values: vec![Tensor::linspace(-1, 1, 3 * 8 * 8, CPU).view([3, 8, 8])],
            spans: Spans { rows: vec![vec![Span::text(2), Span::image(2, 2), Span::text(3)]] },
        }
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
        assert!(error(&|i| i.pixel_values.push(Tensor::zeros([3, 8, 8], CPU))).contains("make 8 patches"));
        assert!(error(&|i| i.spans = Spans::text(&[9])).contains("no place"));
        let text = Piece::Text { ids: vec![1], supervised: false };
        let error = Input::prompt(&[text, Piece::Image], Vec::new(), &model).unwrap_err().to_string();
        assert_eq!(error, "0 pictures for 1 image places");
    }
}
