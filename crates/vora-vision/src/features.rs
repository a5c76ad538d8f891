//! Which hidden states of a vision encoder a language model is given.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The two keys of a LLaVA's `config.json` that say so; `#[serde(flatten)]` puts them into a larger config.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FeatureSelection {
    /// The layer, or the layers.
    pub vision_feature_layer: VisionFeatureLayer,
    /// What becomes of tokens that are no patch.
    pub vision_feature_select_strategy: VisionFeatureSelectStrategy,
}

/// Indices of hidden states: 0 is what goes into the first block, `n` the output of the nth block, -1 that of the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected the number of a layer, or a list of them")]
pub enum VisionFeatureLayer {
    /// One hidden state; -2 in LLaVA.
    One(i64),
    /// Several, put side by side.
    Several(Vec<i64>),
}

impl Default for VisionFeatureLayer {
    fn default() -> Self {
        Self::One(-2)
    }
}

/// What becomes of tokens that are no patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VisionFeatureSelectStrategy {
    /// Class token and registers are left out. Hugging Face leaves out the first token, whatever it is: the same for
    /// CLIP, but a patch less for encoders that have no class token.
    #[default]
    Default,
    /// All tokens.
    Full,
}

impl FeatureSelection {
    /// How many hidden states are put side by side.
    pub fn num_layers(&self) -> i64 {
        self.layers().len() as i64
    }

    /// The chosen indices among the `num_hidden_layers + 1` hidden states, in their order.
    ///
    /// # Errors
    /// Where one is out of range, or none is chosen.
    pub fn hidden_state_indices(&self, num_hidden_layers: usize) -> Result<Vec<usize>> {
        let layers = self.layers();
        ensure!(!layers.is_empty(), "vision_feature_layer chooses no layer");
        let count = num_hidden_layers as i64 + 1;
        let index = |&layer: &i64| {
            ensure!(
                (-count..count).contains(&layer),
                "vision_feature_layer is {layer}, an encoder of {num_hidden_layers} blocks has {} to {num_hidden_layers}",
                -count
            );
            Ok(layer.rem_euclid(count) as usize)
        };
        layers.iter().map(index).collect()
    }

    /// How many of the first of `num_hidden_layers` blocks the chosen hidden states depend on.
    ///
    /// # Errors
    /// As [`FeatureSelection::hidden_state_indices`].
    pub fn num_blocks(&self, num_hidden_layers: usize) -> Result<usize> {
        Ok(self.hidden_state_indices(num_hidden_layers)?.into_iter().max().unwrap_or(0))
    }

    fn layers(&self) -> &[i64] {
        match &self.vision_feature_layer {
            VisionFeatureLayer::One(layer) => std::slice::from_ref(layer),
            VisionFeatureLayer::Several(layers) => layers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tch::{Device, Kind, Tensor};
    use vora_torch::weights::Weights;

    use crate::encoders::Dinov2Config;
    use crate::golden::load;

    fn selection(json: serde_json::Value) -> FeatureSelection {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn layers_count_from_either_end_and_stand_side_by_side() {
        let golden = fixtures::open("clip");
        let model = load("clip", golden.under("weights."), Kind::Float);
        let pixel_values = &golden["wide.pixel_values"]; // 3 x 7 patches
        let features = |json| model.features(pixel_values, &selection(json)).unwrap();
        let state = |i: usize| golden[&format!("wide.hidden_states.{i}")].shallow_clone();
        let patches = |i: usize| state(i).narrow(1, 1, 21);

        fixtures::assert_close_to(&features(json!({})), &patches(2), 2e-5);
        fixtures::assert_close_to(&features(json!({"vision_feature_layer": -1})), &patches(3), 2e-5);
        fixtures::assert_close_to(&features(json!({"vision_feature_layer": 0})), &patches(0), 2e-5);
        let full = features(json!({"vision_feature_layer": 1, "vision_feature_select_strategy": "full"}));
        fixtures::assert_close_to(&full, &state(1), 2e-5);
        let several = selection(json!({"vision_feature_layer": [-2, 0, 3]}));
        assert_eq!(several.num_layers(), 3);
        let found = model.features(pixel_values, &several).unwrap();
        fixtures::assert_close_to(&found, &Tensor::cat(&[patches(2), patches(0), patches(3)], -1), 2e-5);
    }

    #[test]
    fn registers_are_left_out_with_the_class_token() {
        let config = Dinov2Config { num_register_tokens: 3, ..Dinov2Config::tiny() };
        let model = config.load(&Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        let pixel_values = fixtures::Random::new(1).normal([1, 3, 8, 8]);
        let found = model.features(&pixel_values, &FeatureSelection::default()).unwrap();
        assert!(found.equal(&model.hidden_states(&pixel_values)[2].narrow(1, 4, 4)));
    }

    #[test]
    fn layers_that_are_not_there_are_refused() {
        let refuse = |json| selection(json).hidden_state_indices(3).unwrap_err().to_string();
        let error = refuse(json!({"vision_feature_layer": -5}));
        assert_eq!(error, "vision_feature_layer is -5, an encoder of 3 blocks has -4 to 3");
        assert!(refuse(json!({"vision_feature_layer": [1, 4]})).contains("vision_feature_layer is 4"));
        assert!(refuse(json!({"vision_feature_layer": []})).contains("chooses no layer"));
    }
}
