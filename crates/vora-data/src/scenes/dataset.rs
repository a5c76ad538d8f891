//! One split of the dataset.

use anyhow::{Result, ensure};

use super::colour::Colour;
use super::config::ScenesConfig;
use super::shape::Shape;
use super::split::Split;

/// One split of the dataset.
#[derive(Debug, Clone)]
pub struct Scenes {
    pub(super) config: ScenesConfig,
    pub(super) split: Split,
    pub(super) held_out: Vec<(Colour, Shape)>,
}

impl Scenes {
    /// # Errors
    /// Where the config makes no dataset, or the split `unseen` is asked of one that holds nothing out.
    pub fn new(config: ScenesConfig, split: Split) -> Result<Self> {
        config.validate()?;
        ensure!(split != Split::Unseen || config.held_out > 0, "scenes.held_out is 0, so there is no split `unseen`");
        ensure!(
            split != Split::Train || !config.describes_too_early(),
            "scenes.kinds asks for descriptions alone, which tell shapes: shape_of_named_after must be 0, not {}",
            config.shape_of_named_after
        );
        Ok(Self { held_out: config.held_out_pairs(), config, split })
    }

    /// What the dataset was made from.
    pub fn config(&self) -> &ScenesConfig {
        &self.config
    }

    /// Which split it is.
    pub fn split(&self) -> Split {
        self.split
    }

    /// The named colours in use.
    pub fn colours(&self) -> &[Colour] {
        &self.config.colours
    }

    /// The shapes in use.
    pub fn shapes(&self) -> &[Shape] {
        &self.config.shapes
    }

    /// The pairs that come together in the split `unseen` only.
    pub fn held_out(&self) -> &[(Colour, Shape)] {
        &self.held_out
    }
}

#[cfg(test)]
mod tests {
    use super::super::QuestionKind;
    use super::*;

    #[test]
    fn splits_and_seeds_give_other_pictures() {
        let picture = |seed, split| {
            Scenes::new(ScenesConfig { seed, ..ScenesConfig::default() }, split).unwrap().render(0).into_raw()
        };
        assert_eq!(picture(0, Split::Train), picture(0, Split::Train));
        assert_ne!(picture(0, Split::Train), picture(0, Split::Test));
        assert_ne!(picture(0, Split::Train), picture(1, Split::Train));
    }

    #[test]
    fn descriptions_alone_cannot_wait() {
        let kinds = [(QuestionKind::Describe, 1.0)].into();
        let config = ScenesConfig { kinds, kinds_of_several: None, shape_of_named_after: 9, ..ScenesConfig::default() };
        let error = Scenes::new(config.clone(), Split::Train).unwrap_err().to_string();
        assert!(error.contains("shape_of_named_after must be 0, not 9"), "{error}");
        assert_eq!(Scenes::new(config, Split::Test).unwrap().questions(0).len(), 1);
    }

    #[test]
    fn unseen_needs_something_held_out() {
        let config = ScenesConfig { held_out: 0, ..ScenesConfig::default() };
        assert!(Scenes::new(config, Split::Unseen).unwrap_err().to_string().contains("scenes.held_out is 0"));
    }
}
