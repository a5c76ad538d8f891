//! Rotary position embedding (Su et al. 2021): cos and sin of a batch's positions.

use anyhow::Result;
use tch::{Kind, Tensor};
use vora_torch::nn::fused;

use crate::config::LlmConfig;
use crate::rope::Rotation;

/// The rotation of one batch: made once, shared by its layers.
#[derive(Debug)]
pub struct CosSin {
    full: [Tensor; 2],            // cos and sin, [batch, seq, head_dim / 2] each, f32
    sliding: Option<[Tensor; 2]>, // those of layers with a window, where they have others
}

impl CosSin {
    /// Rotates every head as layers with a window do (`slides`), or those without: `[batch, seq, heads, head_dim]` -> the
    /// same.
    pub fn rotate(&self, x: &Tensor, slides: bool) -> Tensor {
        let [cos, sin] = self.sliding.as_ref().filter(|_| slides).unwrap_or(&self.full);
        fused::rotate(x, cos, sin)
    }
}

/// The frequencies that turn positions into angles.
#[derive(Debug)]
pub struct Rotary {
    full: Rotation,
    sliding: Option<Rotation>, // of layers with a window, where it is another
}

impl Rotary {
    /// Takes base and scaling from the config.
    ///
    /// # Errors
    /// See [`LlmConfig::rotation`].
    pub fn new(config: &LlmConfig) -> Result<Self> {
        let sliding = config.has_two_rotations().then(|| config.rotation(true)).transpose()?;
        Ok(Self { full: config.rotation(false)?, sliding })
    }

    /// Cos and sin of `position_ids` `[batch, seq]`, all of which lie below `seq_len`.
    pub fn cos_sin(&self, position_ids: &Tensor, seq_len: i64) -> CosSin {
        let of = |rotation: &Rotation| {
            let inv_freq: Vec<f32> = rotation.inv_freq(seq_len).iter().map(|&f| f as f32).collect();
            let inv_freq = Tensor::from_slice(&inv_freq).to_device(position_ids.device()); // [head_dim / 2]
            let angles = position_ids.to_kind(Kind::Float).unsqueeze(-1) * inv_freq; // [batch, seq, head_dim / 2]
            let factor = rotation.scaling.attention_factor();
            [angles.cos() * factor, angles.sin() * factor]
        };
        CosSin { full: of(&self.full), sliding: self.sliding.as_ref().map(of) }
    }

    /// Adds cos and sin of one position in a text of `seq_len` tokens, `[head_dim / 2]` each, for layers that have no window
    /// or no other rotation within it.
    pub(crate) fn push_angles(&self, position_id: i64, seq_len: i64, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let factor = self.full.scaling.attention_factor() as f32;
        for inv_freq in self.full.inv_freq(seq_len) {
            let angle = position_id as f32 * inv_freq as f32;
            cos.push(angle.cos() * factor);
            sin.push(angle.sin() * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// Rope types of the golden file, as configs name them.
    fn cases() -> Vec<(&'static str, LlmConfig)> {
        let case = |json: &str| LlmConfig {
            rope_theta: None,
            rope_parameters: Some(serde_json::from_str(json).unwrap()),
            max_position_embeddings: 64,
            ..LlmConfig::tiny(64)
        };
        vec![
            ("default", case(r#"{"rope_type": "default", "rope_theta": 10000.0}"#)),
            ("linear", case(r#"{"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}"#)),
            ("dynamic", case(r#"{"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}"#)),
            (
                "llama3",
                case(
                    r#"{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#,
                ),
            ),
            (
                "yarn",
                case(
                    r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 4.0,
                        "original_max_position_embeddings": 16}"#,
                ),
            ),
            (
                "yarn_mscale",
                case(
                    r#"{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "beta_fast": 2.0,
                        "mscale_all_dim": 1.2, "truncate": false, "original_max_position_embeddings": 16}"#,
                ),
            ),
            (
                "longrope",
                case(
                    r#"{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
                        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}"#,
                ),
            ),
        ]
    }

    /// Every scaling at a length within and one beyond what it was trained for.
    #[test]
    fn matches_reference() {
        let golden = fixtures::open("rotary");
        for (name, config) in cases() {
            let rotary = Rotary::new(&config).unwrap();
            for seq_len in [12, 96] {
                let position_ids = Tensor::arange(seq_len, (Kind::Int64, Device::Cpu)).unsqueeze(0);
                let cos_sin = rotary.cos_sin(&position_ids, seq_len);
                let x = golden["x"].narrow(2, 0, seq_len).transpose(1, 2); // [batch, seq, heads, head_dim]
                let found = cos_sin.rotate(&x, false).transpose(1, 2);
                fixtures::assert_close_to(&found, &golden[&format!("{name}.{seq_len}")], 2e-5);
            }
        }
    }
}
