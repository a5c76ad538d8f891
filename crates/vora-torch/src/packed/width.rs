//! How many bits a weight has while decoding.

use std::fmt;

use anyhow::Result;

/// How a matrix's numbers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Width {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// 8 bits and an f16 scale for every 32 numbers of a row, without an offset: the numbers of ggml's `Q8_0`.
    Int8,
    /// 4 bits and an f16 scale for every 32 numbers of a row, without an offset: the numbers of ggml's `Q4_0`.
    Int4,
}

impl Width {
    /// All of them, the widest first.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Int8, Self::Int4];

    /// The name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }

    /// The width of this name.
    ///
    /// # Errors
    /// Where there is none, with those that there are.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|width| width.name() == name);
        found.ok_or_else(|| anyhow::anyhow!("`{name}` is none of f32, bf16, int8, int4"))
    }

    /// Whether numbers share scales.
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// The number that `csrc/decode/kernel.h` has for it.
    pub(crate) fn code(self) -> i64 {
        match self {
            Self::F32 => 0,
            Self::Bf16 => 1,
            Self::Int8 => 2,
            Self::Int4 => 3,
        }
    }
}

impl fmt::Display for Width {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
