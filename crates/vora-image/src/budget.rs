//! The size of a picture that keeps its own shape: whole patches, as many as a budget of tokens holds.

use anyhow::{Result, ensure};
use vora_files::tell_once;

/// How many tokens a picture may become, each the square patch of so many pixels a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBudget {
    patch_size: u32,
    min_image_tokens: u32,
    max_image_tokens: u32,
}

/// How far the side of a grid may be from a whole number by rounding alone.
const EPS: f64 = 1e-6;

impl TokenBudget {
    /// From `min_image_tokens` to `max_image_tokens` patches of `patch_size` pixels a side.
    ///
    /// # Errors
    /// Names the key that leaves no picture possible.
    pub fn new(patch_size: u32, min_image_tokens: u32, max_image_tokens: u32) -> Result<Self> {
        ensure!(patch_size >= 1, "patch_size is 0, it must be at least 1");
        for (key, tokens) in [("max_image_tokens", max_image_tokens), ("min_image_tokens", min_image_tokens)] {
            ensure!(tokens >= 1, "{key} is {tokens}, a picture takes at least 1 token");
        }
        ensure!(
            min_image_tokens <= max_image_tokens,
            "min_image_tokens is {min_image_tokens}, more than max_image_tokens, {max_image_tokens}"
        );
        Ok(Self { patch_size, min_image_tokens, max_image_tokens })
    }

    /// The same with another maximum, which the minimum gives way to.
    ///
    /// # Errors
    /// As [`TokenBudget::new`].
    pub fn with_max(self, max_image_tokens: u32) -> Result<Self> {
        Self::new(self.patch_size, self.min_image_tokens.min(max_image_tokens), max_image_tokens)
    }

    /// Side of a patch, in pixels.
    pub fn patch_size(&self) -> u32 {
        self.patch_size
    }

    /// The tokens that a smaller picture is enlarged to.
    pub fn min_image_tokens(&self) -> u32 {
        self.min_image_tokens
    }

    /// The tokens that no picture exceeds.
    pub fn max_image_tokens(&self) -> u32 {
        self.max_image_tokens
    }

    /// Rows and columns of patches of a picture of `height` x `width` pixels: the nearest to its own size, which is
    /// enlarged where it has fewer than `min_image_tokens`, or no whole patch along a side, and made smaller where it has
    /// more than `max_image_tokens`. The maximum always holds; the minimum gives way where no grid of the picture's
    /// shape has a number of patches between the two.
    ///
    /// # Errors
    /// Where the picture is so long and thin that even a single row of `max_image_tokens` patches would lose its shape.
    pub fn grid(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        let (short, long) = (height.min(width), height.max(width));
        ensure!(short > 0, "a picture of {width} x {height} pixels shows nothing");
        let max = self.max_image_tokens;
        ensure!(
            u64::from(long) <= u64::from(max) * u64::from(short),
            "a picture of {width} x {height} pixels cannot keep its shape within {max} tokens: crop it, or raise max_image_tokens"
        );
        let sides = [height, width].map(|side| f64::from(side) / f64::from(self.patch_size));
        let scaled = |scale: f64, whole: fn(f64) -> f64| sides.map(|side| whole(side * scale).max(1.0));
        let scale_to = |tokens: u32| (f64::from(tokens) / (sides[0] * sides[1])).sqrt();

        let mut grid = scaled((1.0 / sides[0].min(sides[1])).max(1.0), f64::round_ties_even);
        if grid[0] * grid[1] < f64::from(self.min_image_tokens) {
            grid = scaled(scale_to(self.min_image_tokens), |side| (side - EPS).ceil());
        }
        if grid[0] * grid[1] > f64::from(max) {
            grid = scaled(scale_to(max), |side| (side + EPS).floor());
        }
        Ok((grid[0] as u32, grid[1] as u32))
    }

    /// The height and width in pixels of the same; says once that pictures become smaller.
    ///
    /// # Errors
    /// As [`TokenBudget::grid`].
    pub fn size(&self, height: u32, width: u32) -> Result<(u32, u32)> {
        let (rows, columns) = self.grid(height, width)?;
        // Rounded to whole patches, no side loses more than half of one.
        let shrinks =
            |side: u32, patches: u32| 2 * u64::from(side) > (2 * u64::from(patches) + 1) * u64::from(self.patch_size);
        if shrinks(height, rows) || shrinks(width, columns) {
            tell_once(format!(
                "pictures larger than max_image_tokens ({} patches of {} x {} pixels) are scaled down; they keep their shape",
                self.max_image_tokens, self.patch_size, self.patch_size
            ));
        }
        Ok((rows * self.patch_size, columns * self.patch_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(budget: (u32, u32), height: u32, width: u32) -> (u32, u32) {
        TokenBudget::new(14, budget.0, budget.1).unwrap().grid(height, width).unwrap()
    }

    #[test]
    fn a_picture_keeps_its_size_within_the_budget() {
        assert_eq!(grid((1, 16), 56, 56), (4, 4));
        assert_eq!(grid((1, 64), 50, 118), (4, 8)); // the nearest whole patches
        assert_eq!(grid((1, 16), 112, 112), (4, 4));
        assert_eq!(grid((1, 16), 448, 448), (4, 4));
        assert_eq!(grid((1, 16), 100, 300), (2, 6));
        assert_eq!(grid((16, 64), 28, 28), (4, 4));
        assert_eq!(grid((16, 64), 14, 42), (3, 7));
        assert_eq!(grid((1, 256), 3, 600), (1, 200)); // a side of one patch at least, and the shape is kept
        assert_eq!(grid((16, 16), 60, 90), (3, 4)); // no grid of 3:2 has 16: the maximum holds
    }

    #[test]
    fn no_picture_exceeds_the_maximum_nor_loses_its_shape() {
        for max in [1u32, 4, 16, 63, 64, 255, 256, 1024] {
            for (min, patch) in [(1, 14), (max.div_ceil(4), 16), (max, 3)] {
                let budget = TokenBudget::new(patch, min, max).unwrap();
                for height in (1..700).step_by(13) {
                    for width in (1..700).step_by(17) {
                        let Ok((rows, columns)) = budget.grid(height, width) else {
                            assert!(height.max(width) > max * height.min(width));
                            continue;
                        };
                        assert!(rows >= 1 && columns >= 1 && rows * columns <= max, "{budget:?} {height} {width}");
                        // Each side is off by less than one patch.
                        let scale = |side: u32, patches: u32, d: f64| (f64::from(patches) + d) / f64::from(side);
                        let (h, w) = (
                            [-1.0, 1.0].map(|d| scale(height, rows, d)),
                            [-1.0, 1.0].map(|d| scale(width, columns, d)),
                        );
                        assert!(h[0] < w[1] && w[0] < h[1], "{budget:?} {height} x {width}: {rows} x {columns}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_told_by_name() {
        let error = |min, max| TokenBudget::new(14, min, max).unwrap_err().to_string();
        assert_eq!(error(1, 0), "max_image_tokens is 0, a picture takes at least 1 token");
        assert_eq!(error(0, 4), "min_image_tokens is 0, a picture takes at least 1 token");
        assert_eq!(error(9, 4), "min_image_tokens is 9, more than max_image_tokens, 4");
        let budget = TokenBudget::new(14, 1, 64).unwrap();
        assert_eq!(
            budget.size(14, 2800).unwrap_err().to_string(),
            "a picture of 2800 x 14 pixels cannot keep its shape within 64 tokens: crop it, or raise max_image_tokens"
        );
        assert_eq!(budget.with_max(200).unwrap().size(14, 2800).unwrap(), (14, 2800));
    }

    /// `whole_patches` of `processing_vora.py`, by which HF transformers opens a VoRA's folder.
    #[test]
    fn the_processor_for_transformers_has_the_same_sizes() {
        let text = std::fs::read(fixtures::root().join("golden/token_budget.json")).unwrap();
        type Case = ([u32; 3], u32, u32, Option<(u32, u32)>);
        let cases: Vec<Case> = serde_json::from_slice(&text).unwrap();
        assert!(cases.iter().any(|(.., size)| size.is_none()) && cases.len() > 200);
        for ([patch_size, min, max], height, width, expected) in cases {
            let budget = TokenBudget::new(patch_size, min, max).unwrap();
            assert_eq!(budget.size(height, width).ok(), expected, "{budget:?} {height} x {width}");
        }
    }
}
