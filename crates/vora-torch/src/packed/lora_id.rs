//! `LoraId`: which adapter acts on a token.

use std::fmt;

/// Which of a model's adapters acts on a token. Tokens of one step may each have another one.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct LoraId(u8);

impl LoraId {
    /// None: the model as it is without adapters.
    pub const NONE: Self = Self(0);
    /// The model's own, all together.
    pub const OWN: Self = Self(1);
    /// How many there may be that have names.
    pub const MAX_NAMED: usize = u8::MAX as usize - 1;

    /// The adapter with a name that came so many after the first; none beyond [`LoraId::MAX_NAMED`].
    pub fn named(index: usize) -> Option<Self> {
        u8::try_from(index + 2).ok().map(Self)
    }

    /// Its place among a linear's adapters; none where it is none.
    pub fn place(self) -> Option<usize> {
        usize::from(self.0).checked_sub(1)
    }

    /// The model's own where `on` says so, else none.
    pub fn own_if(on: bool) -> Self {
        if on { Self::OWN } else { Self::NONE }
    }
}

impl fmt::Debug for LoraId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => write!(f, "none"),
            Self::OWN => write!(f, "own"),
            Self(id) => write!(f, "named {}", id - 2),
        }
    }
}
