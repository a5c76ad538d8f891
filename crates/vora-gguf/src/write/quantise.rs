//! Numbers in f32 as the kinds of a file that is written.

use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use half::{bf16, f16};

use crate::TensorKind;

/// What the matrices of a file are stored as; vectors and norms are F32 in all of them, as llama.cpp wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs, reason = "spelled as ggml spells them")]
pub enum FileKind {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
}

impl FileKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0];

    /// The number that `general.file_type` has for it: `llama_ftype` of llama.cpp.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::BF16 => 32,
        }
    }

    /// What a tensor of this shape is stored as: rows that do not divide into blocks are F16, as the converter has them.
    pub(crate) fn of(self, name: &str, shape: &[usize]) -> TensorKind {
        let kind = match self {
            Self::F32 => TensorKind::F32,
            Self::F16 => TensorKind::F16,
            Self::BF16 => TensorKind::BF16,
            Self::Q8_0 => TensorKind::Q8_0,
            Self::Q4_0 => TensorKind::Q4_0,
        };
        match shape {
            [_, row] if name.ends_with(".weight") => {
                if row % kind.block().0 == 0 {
                    kind
                } else {
                    TensorKind::F16
                }
            }
            _ => TensorKind::F32,
        }
    }
}

impl FromStr for FileKind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| format!("{kind:?}").eq_ignore_ascii_case(name));
        let Some(found) = found else { bail!("`{name}` is none of f32, f16, bf16, q8_0, q4_0") };
        Ok(found)
    }
}

/// Appends values as this kind stores them, with the bits of the Python package `gguf` 0.19.0 (`gguf.quants.quantize`).
///
/// # Errors
/// Where a number is not finite, or beyond the largest that the kind, or the scale of its blocks, can have.
pub(crate) fn quantise(kind: TensorKind, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    ensure!(values.iter().all(|value| value.is_finite()), "it has a number that is not finite");
    let scale = |d: f32| {
        let d = f16::from_f32(d);
        ensure!(d.is_finite(), "it has numbers that are beyond what {kind} can have");
        anyhow::Ok(d.to_le_bytes())
    };
    match kind {
        TensorKind::F32 => values.iter().for_each(|value| out.extend(value.to_le_bytes())),
        TensorKind::F16 => {
            for &value in values {
                out.extend(scale(value)?);
            }
        }
        TensorKind::BF16 => {
            for &value in values {
                let value = bf16::from_f32(value);
                ensure!(value.is_finite(), "it has numbers that are beyond what {kind} can have");
                out.extend(value.to_le_bytes());
            }
        }
        TensorKind::Q8_0 => {
            for block in values.chunks_exact(32) {
                let d = block.iter().fold(0.0, |most: f32, value| most.max(value.abs())) / 127.0;
                let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
                out.extend(scale(d)?);
                // Half a step goes away from zero.
                out.extend(block.iter().map(|value| ((value * inverse).round() as i8).cast_unsigned()));
            }
        }
        TensorKind::Q4_0 => {
            for block in values.chunks_exact(32) {
                // The first of the largest is the lowest step of its sign, of which there is one more than of the other.
                let largest =
                    block.iter().fold(0.0, |most: f32, &value| if value.abs() > most.abs() { value } else { most });
                let d = largest / -8.0;
                let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
                out.extend(scale(d)?);
                let step = |value: f32| ((value * inverse + 8.5) as u8).min(15);
                let (low, high) = block.split_at(16);
                out.extend(low.iter().zip(high).map(|(&low, &high)| step(low) | step(high) << 4));
            }
        }
        other => bail!("{other} is read here, and not written"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const GOLDEN: &[u8] = include_bytes!("../../../../fixtures/golden/gguf_quants.safetensors");

    #[test]
    fn blocks_are_those_of_the_python_package_bit_for_bit() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        let values: Vec<f32> = golden
            .tensor("values")
            .unwrap()
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect();
        for kind in [TensorKind::F16, TensorKind::BF16, TensorKind::Q8_0, TensorKind::Q4_0] {
            let mut found = Vec::new();
            quantise(kind, &values, &mut found).unwrap();
            assert!(found == golden.tensor(&kind.to_string()).unwrap().data(), "{kind}");
        }
    }

    #[test]
    fn what_no_kind_can_have_is_refused() {
        let error = |kind, value| quantise(kind, &[value; 32], &mut Vec::new()).unwrap_err().to_string();
        assert_eq!(error(TensorKind::F32, f32::NAN), "it has a number that is not finite");
        assert!(error(TensorKind::F16, 1e6).ends_with("beyond what F16 can have"));
        assert!(error(TensorKind::Q4_0, 1e6).ends_with("beyond what Q4_0 can have"));
        assert!(error(TensorKind::BF16, f32::MAX).ends_with("beyond what BF16 can have"));
        assert_eq!("Q8_0".parse::<FileKind>().unwrap(), FileKind::Q8_0);
        assert!("q5_k".parse::<FileKind>().unwrap_err().to_string().starts_with("`q5_k` is none of f32"));
    }
}
