//! A vision transformer in a folder, with the way its pictures are prepared.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_image::ImageProcessor;
use vora_torch::weights::Weights;

use crate::encoder::config::EncoderConfig;
use crate::features::FeatureSelection;
use crate::transformer::{Patchifier, VisionTransformer};

/// A vision transformer of any family, and what its pictures go through. It is frozen, but for one of
/// [`Encoder::open_trained`] and for adapters on its linears.
#[derive(Debug)]
pub struct Encoder {
    model: VisionTransformer,
    processor: ImageProcessor,
    config: Option<EncoderConfig>,
    tensors: Vec<(String, Tensor)>,
    trained: Vec<(String, Tensor)>,
}

/// What the names of a patch embedding begin with in Apple's own layout.
const APPLES_PREPROCESSOR: &str = "preprocessor.";

impl Encoder {
    /// Opens a model folder: `config.json` says which transformer it is, `preprocessor_config.json` how pictures are
    /// prepared ([`EncoderConfig::processor`]). A folder may hold more than the encoder:
    /// the words' half of a CLIP, pooling heads.
    ///
    /// # Errors
    /// Names the file and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind) -> Result<Self> {
        let config = EncoderConfig::open(folder)?;
        Self::load_whole(&config, &Weights::open(folder, device, kind)?, folder)
    }

    /// The same to be counted, from a folder that may lack the weights: its config gives their shapes ([`Weights::shapes`]), and
    /// nothing can be computed with it.
    ///
    /// # Errors
    /// As [`Encoder::open`].
    pub fn outline(folder: &Path, kind: Kind) -> Result<Self> {
        let config = EncoderConfig::open(folder)?;
        Self::load_whole(&config, &Weights::shapes(kind), folder)
    }

    /// As [`Encoder::open`], with these tensors in place of its own of the same names ([`Encoder::tensors`]): those that were
    /// trained.
    ///
    /// # Errors
    /// As [`Encoder::open`], and where it has none of a name.
    pub fn open_with(folder: &Path, changed: Vec<(String, Tensor)>, device: Device, kind: Kind) -> Result<Self> {
        let (config, weights) = own_weights(folder, changed, device, kind)?;
        Self::load_whole(&config, &weights, folder)
    }

    /// As [`Encoder::open_with`], all of whose weights are trained that these features depend on; the source of its weights
    /// has them as parameters, by the names of [`Encoder::tensors`].
    ///
    /// # Errors
    /// As [`Encoder::open_with`], and where the features are none of this model's.
    pub fn open_trained(
        folder: &Path,
        changed: Vec<(String, Tensor)>,
        features: &FeatureSelection,
        device: Device,
        kind: Kind,
    ) -> Result<(Self, Weights)> {
        let (config, weights) = own_weights(folder, changed, device, kind)?;
        let num_layers = features.num_blocks(config.num_hidden_layers())?;
        let beyond = weights.names().into_iter().filter(|name| config.is_beyond(num_layers, name));
        let weights = weights.trained_but(beyond);
        Ok((Self::load_whole(&config, &weights, folder)?, weights))
    }

    /// One from the source of all that its folder holds.
    fn load_whole(config: &EncoderConfig, weights: &Weights, folder: &Path) -> Result<Self> {
        let encoder =
            Self::load(config, weights).with_context(|| format!("in {}", folder.join("config.json").display()))?;
        weights
            .finish_allowing(|name| config.leaves_out(name))
            .with_context(|| format!("loading the vision encoder in {}", folder.display()))?;
        Ok(Self { processor: config.processor(folder)?, ..encoder })
    }

    /// The same with other values of some of [`Encoder::tensors`], and without adapters; frozen.
    ///
    /// # Errors
    /// Where the encoder is in no file.
    pub fn with_tensors(&self, tensors: Vec<(String, Tensor)>) -> Result<Self> {
        let config = self.config.as_ref().context("the vision encoder was made in memory, it has no tensors")?;
        let weights = Weights::from_tensors(tensors, self.model.device(), self.model.kind());
        Ok(Self { processor: self.processor.clone(), ..Self::load(config, &weights)? })
    }

    /// One inside a larger model, from its own names; see [`EncoderConfig::load`]. Its pictures are prepared as
    /// [`EncoderConfig::default_processor`] says.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish_allowing()`.
    pub fn load(config: &EncoderConfig, weights: &Weights) -> Result<Self> {
        let model = config.load(weights)?;
        let below = if weights.path().is_empty() { String::new() } else { format!("{}.", weights.path()) };
        let trained = weights.parameters().into_iter();
        let trained = trained.filter_map(|(name, tensor)| Some((name.strip_prefix(&below)?.to_owned(), tensor)));
        Ok(Self {
            model,
            processor: config.default_processor(),
            config: Some(config.clone()),
            tensors: config.own_tensors(weights.stored()?),
            trained: trained.collect(),
        })
    }

    /// One that is in no folder, with no tensors to write into one.
    pub fn new(model: VisionTransformer, processor: ImageProcessor) -> Self {
        Self { model, processor, config: None, tensors: Vec::new(), trained: Vec::new() }
    }

    /// The transformer.
    pub fn model(&self) -> &VisionTransformer {
        &self.model
    }

    /// The transformer, to change its linears.
    pub fn model_mut(&mut self) -> &mut VisionTransformer {
        &mut self.model
    }

    /// The weights that are trained, by their names among [`Encoder::tensors`]: f32 leaves; none of a frozen one.
    pub fn trained(&self) -> &[(String, Tensor)] {
        &self.trained
    }

    /// [`Encoder::tensors`] with those that are trained as they are by now.
    pub fn current_tensors(&self) -> Vec<(String, Tensor)> {
        let trained = |name: &str| self.trained.iter().find_map(|(other, tensor)| (other == name).then_some(tensor));
        let current = |(name, stored): &(String, Tensor)| {
            (name.clone(), trained(name).map_or_else(|| stored.shallow_clone(), Tensor::detach))
        };
        self.tensors.iter().map(current).collect()
    }

    /// How its pictures are prepared; [`ImageProcessor::with_aspect`] gives the same at another size.
    pub fn processor(&self) -> &ImageProcessor {
        &self.processor
    }

    /// Its tensors as they lie in their file, with heads that no hidden state needs, by the names that Hugging Face's
    /// vision model alone has for them; on the CPU, in the dtype they are stored in. None of a model that is in no file.
    pub fn tensors(&self) -> &[(String, Tensor)] {
        &self.tensors
    }

    /// The place among [`Encoder::patch_states`] of what its own class calls the first hidden state: what goes into the
    /// first block, or for AIMv2 in Apple's own layout what comes out of it.
    pub fn first_hidden_state(&self) -> usize {
        usize::from(self.tensors.iter().any(|(name, _)| name.contains(APPLES_PREPROCESSOR)))
    }

    /// The tensors that AIMv2 in Apple's own layout makes patches with, by their names there; none of any other.
    pub fn preprocessor(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().filter_map(|(name, tensor)| {
            let at = name.find(APPLES_PREPROCESSOR)?;
            Some((&name[at + APPLES_PREPROCESSOR.len()..], tensor))
        })
    }

    /// What Hugging Face's class itself calls the module of this name among [`Encoder::tensors`].
    pub fn module_name(&self, name: &str) -> String {
        self.config.as_ref().map_or_else(|| name.to_owned(), |config| config.module_name(name))
    }

    /// Channels of its hidden states.
    pub fn hidden_size(&self) -> i64 {
        self.model.hidden_size()
    }

    /// Its blocks.
    pub fn num_hidden_layers(&self) -> usize {
        self.model.num_hidden_layers()
    }

    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> i64 {
        self.model.patch_size()
    }

    /// The start for a student's own patch embedding.
    pub fn patchifier(&self) -> Patchifier<'_> {
        self.model.patchifier()
    }

    /// `[batch, 3, height, width]` -> for what goes into the first block (index 0) and each of the first `num_layers`
    /// blocks `[batch, patches, hidden]`: patch tokens only, row by row.
    ///
    /// # Panics
    /// Where the model has fewer blocks.
    pub fn patch_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let states = self.model.first_hidden_states(pixel_values, num_layers);
        states.iter().map(|hidden| self.model.patch_tokens(hidden)).collect()
    }

    /// `[batch, 3, height, width]` -> `[batch, tokens, layers * hidden]`; see [`VisionTransformer::features`].
    ///
    /// # Errors
    /// Where a chosen layer is none of this model's, or the pictures are smaller than a patch.
    pub fn features(&self, pixel_values: &Tensor, selection: &FeatureSelection) -> Result<Tensor> {
        self.model.features(pixel_values, selection)
    }
}

/// The config and the source of all tensors of the encoder in a folder, by the names of [`Encoder::tensors`], some of them
/// `changed`.
fn own_weights(
    folder: &Path,
    changed: Vec<(String, Tensor)>,
    device: Device,
    kind: Kind,
) -> Result<(EncoderConfig, Weights)> {
    let config = EncoderConfig::open(folder)?;
    let stored = config.own_tensors(Weights::open(folder, device, kind)?.stored()?);
    let mut tensors: BTreeMap<String, Tensor> = stored.into_iter().collect();
    for (name, tensor) in changed {
        let (found, at) = (tensors.get_mut(&name), folder.display());
        let found = found.with_context(|| format!("the encoder in {at} has no tensor `{name}`, one was trained"))?;
        ensure!(
            found.size() == tensor.size(),
            "`{name}` is {:?} in {at}, the trained one {:?}",
            found.size(),
            tensor.size()
        );
        *found = tensor;
    }
    Ok((config, Weights::from_tensors(tensors, device, kind)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use serde_json::json;
    use vora_torch::checkpoint::save;

    #[test]
    fn opens_a_folder_by_its_model_type() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        let open = || Encoder::open(folder.path(), Device::Cpu, Kind::Float);
        let golden = fixtures::open("clip");
        let mut tensors = golden.under("weights.");
        write("config.json", golden::json("clip").to_string());
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        assert_eq!(open().unwrap().processor().output_size(90, 60).unwrap(), (16, 16)); // what CLIP takes where no file says so
        write("preprocessor_config.json", json!({"image_mean": [0.1, 0.2, 0.3], "crop_size": 32}).to_string());

        let encoder = open().unwrap();
        assert_eq!((encoder.hidden_size(), encoder.num_hidden_layers(), encoder.patch_size()), (16, 3, 4));
        let outline = Encoder::outline(folder.path(), Kind::Float).unwrap();
        let shapes = |encoder: &Encoder| -> BTreeMap<String, Vec<i64>> {
            encoder.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect()
        };
        // What no hidden state needs is in the file alone.
        let (counted, mut stored) = (shapes(&outline), shapes(&encoder));
        stored.retain(|name, _| counted.contains_key(name) || !encoder.config.as_ref().unwrap().leaves_out(name));
        assert_eq!(counted, stored);
        let stored: Vec<&str> = encoder.tensors().iter().map(|(name, _)| name.as_str()).collect();
        assert!(stored.contains(&"vision_model.post_layernorm.bias"), "{stored:?}");
        assert!(stored.iter().all(|name| name.starts_with("vision_model.")), "{stored:?}");
        assert_eq!(encoder.processor().mean_std().0, [0.1, 0.2, 0.3]);
        assert_eq!(encoder.processor().output_size(90, 60).unwrap(), (32, 32));
        assert!(encoder.patchifier().bias.is_none());
        assert!(encoder.first_hidden_state() == 0 && encoder.preprocessor().next().is_none());
        assert_eq!(encoder.patchifier().positions.size(), [16, 16]);
        let states = encoder.patch_states(&golden["native.pixel_values"], 2);
        assert_eq!(states.len(), 3);
        fixtures::assert_close_to(&states[2], &golden["native.hidden_states.2"].narrow(1, 1, 16), 2e-5);
        let features = encoder.features(&golden["native.pixel_values"], &FeatureSelection::default()).unwrap();
        assert!(features.equal(&states[2]));
        assert_eq!(encoder.model().grid(18, 31).unwrap(), (4, 7));
        let error = encoder.model().grid(3, 30).unwrap_err().to_string();
        assert_eq!(error, "a picture of 30 x 3 pixels is smaller than a patch of 4 x 4");

        tensors.push((
            "vision_model.encoder.layers.3.mlp.fc1.bias".to_owned(),
            Tensor::zeros([40], (Kind::Float, Device::Cpu)),
        ));
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let error = format!("{:#}", open().unwrap_err());
        assert!(error.contains("unexpected vision_model.encoder.layers.3.mlp.fc1.bias"), "{error}");
        write("config.json", json!({"model_type": "resnet"}).to_string());
        let error = format!("{:#}", open().unwrap_err());
        assert!(error.contains("config.json: model_type `resnet` is not a vision encoder known here"), "{error}");
        let error = format!("{:#}", Encoder::open(Path::new("nowhere"), Device::Cpu, Kind::Float).unwrap_err());
        assert!(error.contains("cannot read nowhere/config.json; a vision encoder is a folder"), "{error}");
    }
}
