//! Height and width of a scene's picture: squares, or shapes and sizes drawn from the seed.

use super::dataset::Scenes;
use super::draw::{Draw, Purpose};
use super::split::Split;

/// Height and width, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureSize {
    /// Rows of pixels.
    pub height: u32,
    /// Columns of pixels.
    pub width: u32,
}

/// Narrowest and widest pictures of the split `shaped`, width over height, where the config says nothing.
const ASPECTS: [f32; 2] = [1.0 / 3.0, 3.0];
/// Its shortest and longest sides, in pixels.
const SIDES: [u32; 2] = [28, 448];

impl PictureSize {
    /// The shorter side.
    pub(super) fn short(self) -> u32 {
        self.height.min(self.width)
    }
}

impl Scenes {
    /// The size of the picture of this number. Where sizes are drawn, every ratio of the longer side to the shorter comes as
    /// often as any other, and small pictures more often than large ones.
    pub fn picture_size(&self, index: u64) -> PictureSize {
        let config = &self.config;
        let drawn = self.split == Split::Shaped || config.aspects.is_some() || config.sides.is_some();
        if !drawn {
            return PictureSize { height: config.image_size, width: config.image_size };
        }
        let draw = &mut Draw::new(config.seed, self.split.stream(), index, Purpose::Size);
        let [narrowest, widest] = config.aspects.unwrap_or(ASPECTS);
        let [shortest, longest] = config.sides.unwrap_or(SIDES).map(|side| side as f32);
        // Ratios below 1 are those above it the other way round.
        let signed = |aspect: f32| if aspect < 1.0 { 1.0 - 1.0 / aspect } else { aspect - 1.0 };
        let drawn = draw.between(signed(narrowest), signed(widest));
        let ratio = (1.0 + drawn.abs()).min(longest / shortest);
        let share = draw.unit();
        let short = shortest + (longest / ratio - shortest) * share * share;
        let [short, long] = [short, short * ratio].map(|side| (side + 0.5) as u32);
        if drawn < 0.0 {
            PictureSize { height: long, width: short }
        } else {
            PictureSize { height: short, width: long }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ScenesConfig;
    use super::*;

    #[test]
    fn shapes_and_sizes_are_as_wide_as_they_may_be() {
        let scenes = Scenes::new(ScenesConfig::default(), Split::Shaped).unwrap();
        let sizes: Vec<PictureSize> = (0..2000).map(|index| scenes.picture_size(index)).collect();
        let ratio = |size: &PictureSize| f64::from(size.width) / f64::from(size.height);
        assert!(sizes.iter().all(|size| size.short() >= 28 && size.height.max(size.width) <= 448));
        assert!(sizes.iter().all(|size| (0.32..3.1).contains(&ratio(size))));
        let count = |is: &dyn Fn(&PictureSize) -> bool| sizes.iter().filter(|size| is(size)).count();
        assert!((900..1100).contains(&count(&|size| size.width > size.height)));
        assert!(count(&|size| ratio(size) > 2.5) > 150 && count(&|size| ratio(size) < 0.4) > 150);
        assert!(count(&|size| size.short() < 40) > 300 && count(&|size| size.short() > 150) > 300);
        assert_eq!(scenes.render(3).dimensions(), (sizes[3].width, sizes[3].height));
    }

    #[test]
    fn a_shaped_picture_shows_the_scene_of_its_square_and_is_asked_the_same() {
        let [square, shaped] =
            [Split::Test, Split::Shaped].map(|split| Scenes::new(ScenesConfig::default(), split).unwrap());
        for index in 0..200 {
            assert_eq!(square.questions(index), shaped.questions(index));
            let told = |scenes: &Scenes| {
                scenes.scene(index).objects.iter().map(|o| (o.shape, o.colour, o.quarter)).collect::<Vec<_>>()
            };
            assert_eq!(told(&square), told(&shaped));
        }
        assert_eq!(square.picture_size(0), PictureSize { height: 56, width: 56 });
    }

    #[test]
    fn the_config_narrows_what_is_drawn() {
        let config = ScenesConfig { aspects: Some([1.0, 1.0]), sides: Some([30, 60]), ..ScenesConfig::default() };
        let scenes = Scenes::new(config, Split::Train).unwrap();
        for index in 0..100 {
            let PictureSize { height, width } = scenes.picture_size(index);
            assert!(height == width && (30..=60).contains(&height));
        }
    }
}
