//! How a tensor's values are stored: plain numbers, or blocks of few bits with scales.

use std::fmt::{self, Display};

use anyhow::{Result, bail};
use half::{bf16, f16};

/// The storage kinds that are read here, by their names in ggml.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs, reason = "spelled as ggml spells them; `dequantise` says what they are")]
pub enum TensorKind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

impl Display for TensorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl TensorKind {
    const ALL: [(u32, Self); 11] = [
        (0, Self::F32),
        (1, Self::F16),
        (2, Self::Q4_0),
        (3, Self::Q4_1),
        (6, Self::Q5_0),
        (7, Self::Q5_1),
        (8, Self::Q8_0),
        (12, Self::Q4_K),
        (13, Self::Q5_K),
        (14, Self::Q6_K),
        (30, Self::BF16),
    ];

    /// The kind of ggml's number `id`.
    pub(crate) fn from_id(id: u32) -> Result<Self> {
        let Some((_, kind)) = Self::ALL.iter().find(|(known, _)| *known == id) else {
            let known: Vec<String> = Self::ALL.iter().map(|(_, kind)| kind.to_string()).collect();
            bail!("kind {id} is not read here, only {}", known.join(", "));
        };
        Ok(*kind)
    }

    /// ggml's number of it.
    pub(crate) fn id(self) -> u32 {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or(u32::MAX, |(id, _)| *id)
    }

    /// Values in a block, and bytes that a block takes.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
        }
    }

    /// Appends the values of whole blocks; the bits are those of the Python `gguf` package.
    pub(crate) fn dequantise(self, bytes: &[u8], out: &mut Vec<f32>) {
        let (block_len, block_bytes) = self.block();
        out.reserve(bytes.len() / block_bytes * block_len);
        let blocks = bytes.chunks_exact(block_bytes);
        match self {
            Self::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            Self::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
            Self::BF16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            Self::Q4_0 => blocks.for_each(|block| {
                let d = half_at(block, 0);
                out.extend(nibbles(&block[2..]).map(|q| d * f32::from(i16::from(q) - 8)));
            }),
            Self::Q4_1 => blocks.for_each(|block| {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                out.extend(nibbles(&block[4..]).map(|q| d * f32::from(q) + m));
            }),
            Self::Q5_0 => blocks.for_each(|block| {
                let d = half_at(block, 0);
                out.extend(fifth_bits(&block[2..]).map(|q| d * f32::from(i16::from(q) - 16)));
            }),
            Self::Q5_1 => blocks.for_each(|block| {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                out.extend(fifth_bits(&block[4..]).map(|q| d * f32::from(q) + m));
            }),
            Self::Q8_0 => blocks.for_each(|block| {
                let d = half_at(block, 0);
                out.extend(block[2..].iter().map(|&q| d * f32::from(q.cast_signed())));
            }),
            Self::Q4_K => blocks.for_each(|block| {
                let (scales, qs) = (k_scales(block), &block[16..]);
                for (pair, qs) in qs.chunks_exact(32).enumerate() {
                    let [(d_low, m_low), (d_high, m_high)] = [scales[2 * pair], scales[2 * pair + 1]];
                    out.extend(qs.iter().map(|q| d_low * f32::from(q & 15) - m_low));
                    out.extend(qs.iter().map(|q| d_high * f32::from(q >> 4) - m_high));
                }
            }),
            Self::Q5_K => blocks.for_each(|block| {
                let (scales, qh, qs) = (k_scales(block), &block[16..48], &block[48..]);
                for (idx, (d, m)) in scales.into_iter().enumerate() {
                    let nibbles = qs[32 * (idx / 2)..].iter().map(|q| if idx % 2 == 0 { q & 15 } else { q >> 4 });
                    let values = nibbles.zip(qh).map(|(q, high)| q | (high >> idx & 1) << 4);
                    out.extend(values.map(|q| d * f32::from(q) - m));
                }
            }),
            Self::Q6_K => blocks.for_each(|block| {
                let (ql, qh, scales, d) = (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
                for idx in 0..8 {
                    // 32 values: four bits of 64 bytes' low halves, then high ones; two bits of 32 bytes, four times.
                    let (half, part) = (idx / 4, idx % 4);
                    let low = &ql[64 * half + 32 * (part % 2)..][..32];
                    let high = &qh[32 * half..][..32];
                    let values = low.iter().zip(high).enumerate().map(|(i, (low, high))| {
                        let low = if part < 2 { low & 15 } else { low >> 4 };
                        let q = low | (high >> (2 * part) & 3) << 4;
                        let scale = d * f32::from(scales[2 * idx + i / 16].cast_signed());
                        scale * f32::from(i16::from(q) - 32)
                    });
                    out.extend(values);
                }
            }),
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 values of four bits: the low halves of 16 bytes, then the high ones.
fn nibbles(packed: &[u8]) -> impl Iterator<Item = u8> {
    packed.iter().map(|q| q & 15).chain(packed.iter().map(|q| q >> 4))
}

/// 32 values of five bits: their highest ones in four bytes, the other four after these as [`nibbles`].
fn fifth_bits(packed: &[u8]) -> impl Iterator<Item = u8> {
    let high = u32::from_le_bytes([packed[0], packed[1], packed[2], packed[3]]);
    nibbles(&packed[4..]).enumerate().map(move |(i, q)| q | ((high >> i & 1) as u8) << 4)
}

/// Scale and offset of the eight groups of 32 in a block that begins with both in f16, then 12 bytes: six bits for
/// each group, those of the last four with their highest two bits in the bytes of the first four.
fn k_scales(block: &[u8]) -> [(f32, f32); 8] {
    let (d, d_min, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    std::array::from_fn(|i| {
        let (scale, min) = match i {
            0..4 => (packed[i] & 63, packed[i + 4] & 63),
            _ => (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4),
        };
        (d * f32::from(scale), d_min * f32::from(min))
    })
}
