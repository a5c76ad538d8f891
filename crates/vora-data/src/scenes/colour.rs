//! The named colours, and colours that lie between them.

use serde::{Deserialize, Serialize};

use super::draw::Draw;

/// Red, green and blue, 0 to 255.
pub(super) type Rgb = [u8; 3];

/// A colour that has a name; its text is the American one, as questions ask for "color".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is the colour of its name")]
pub enum Colour {
    Red,
    Green,
    Blue,
    Yellow,
    Orange,
    Purple,
    Black,
    White,
    Gray,
    Brown,
    Pink,
    Cyan,
}

impl Colour {
    /// Every colour; the first ten are one token each in
    /// SmolLM2's vocabulary, without a space before them too.
    pub const ALL: [Self; 12] = [
        Self::Red,
        Self::Green,
        Self::Blue,
        Self::Yellow,
        Self::Orange,
        Self::Purple,
        Self::Black,
        Self::White,
        Self::Gray,
        Self::Brown,
        Self::Pink,
        Self::Cyan,
    ];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Yellow => "yellow",
            Self::Orange => "orange",
            Self::Purple => "purple",
            Self::Black => "black",
            Self::White => "white",
            Self::Gray => "gray",
            Self::Brown => "brown",
            Self::Pink => "pink",
            Self::Cyan => "cyan",
        }
    }

    /// Its middle, from which an object's own shade strays by the jitter.
    pub(super) fn rgb(self) -> Rgb {
        match self {
            Self::Red => [220, 40, 40],
            Self::Green => [40, 160, 60],
            Self::Blue => [40, 70, 220],
            Self::Yellow => [240, 220, 50],
            Self::Orange => [245, 140, 30],
            Self::Purple => [140, 50, 180],
            Self::Black => [25, 25, 25],
            Self::White => [245, 245, 245],
            Self::Gray => [130, 130, 130],
            Self::Brown => [115, 70, 35],
            Self::Pink => [250, 150, 190],
            Self::Cyan => [60, 210, 220],
        }
    }

    /// A shade of it: each channel off by at most `jitter`.
    pub(super) fn shade(self, draw: &mut Draw, jitter: u8) -> Rgb {
        let jitter = i32::from(jitter);
        self.rgb().map(|channel| (i32::from(channel) + draw.integer(-jitter, jitter)).clamp(0, 255) as u8)
    }
}

/// How far an unnamed colour keeps from every named one.
const UNNAMED_DISTANCE: i32 = 80;

/// A colour that none of the `named` ones describes.
pub(super) fn unnamed(draw: &mut Draw, named: &[Colour]) -> Rgb {
    let mut candidate = [0; 3];
    // The forbidden balls fill less than half of the cube: 64 tries all fail about once in 2^64.
    for _ in 0..64 {
        candidate = std::array::from_fn(|_| draw.below(256) as u8);
        if named.iter().all(|colour| distance_squared(candidate, colour.rgb()) >= UNNAMED_DISTANCE.pow(2)) {
            break;
        }
    }
    candidate
}

pub(super) fn distance_squared(a: Rgb, b: Rgb) -> i32 {
    a.iter().zip(b).map(|(&x, y)| (i32::from(x) - i32::from(y)).pow(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::super::draw::Purpose;
    use super::*;

    #[test]
    fn unnamed_colours_keep_away_from_all_named() {
        let mut draw = Draw::new(0, 0, 0, Purpose::Scene);
        for _ in 0..500 {
            let colour = unnamed(&mut draw, &Colour::ALL);
            assert!(Colour::ALL.iter().all(|c| distance_squared(colour, c.rgb()) >= 80 * 80), "{colour:?}");
        }
    }

    #[test]
    fn named_colours_are_told_apart_even_with_jitter() {
        for (i, a) in Colour::ALL.iter().enumerate() {
            for b in &Colour::ALL[..i] {
                assert!(distance_squared(a.rgb(), b.rgb()) > 75 * 75, "{a:?} {b:?}");
            }
        }
    }
}
