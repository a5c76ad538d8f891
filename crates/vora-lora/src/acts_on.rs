//! Which tokens adapters act on: the rule, and the tokens of one pass that it comes to.

use std::fmt;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};
use vora_torch::nn::decode::LoraId;

/// The tokens that adapters act on, by what they belong to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActsOn {
    /// Every token, as PEFT's adapters do; the only rule that can be merged into the weights.
    #[default]
    All,
    /// Every token of a document that holds a picture, none of one that does not: a prompt without a picture meets the
    /// model as it was before. vLLM's `default_mm_loras` switches adapters in the same way.
    WithImage,
    /// The tokens of pictures alone, as the partial LoRA of InternLM-XComposer2 (arXiv 2401.16420) does; words that come
    /// after them are read and written by the model as it was.
    ImageTokens,
}

impl ActsOn {
    /// The name in run files, configs and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::WithImage => "with_image",
            Self::ImageTokens => "image_tokens",
        }
    }

    /// The rule of this name.
    ///
    /// # Errors
    /// Where there is none, with those that there are.
    pub fn parse(name: &str) -> Result<Self> {
        let known = [Self::All, Self::WithImage, Self::ImageTokens];
        let found = known.into_iter().find(|rule| rule.name() == name);
        found.ok_or_else(|| anyhow::anyhow!("`{name}` is none of all, with_image, image_tokens"))
    }

    /// Checks that adapters trained through these tokens can be opened by the rule `opened`: by the same, and what was
    /// trained through all tokens also where a picture switches it on, as every token of a document that holds one was
    /// trained through.
    ///
    /// # Errors
    /// Where they cannot.
    pub fn check_opened(self, opened: Self) -> Result<()> {
        ensure!(
            opened == self || (self, opened) == (Self::All, Self::WithImage),
            "adapters that were trained through `{self}` cannot act on `{opened}`: {}",
            match self {
                Self::All => "what pictures' tokens become was learned together with what words become after them",
                _ => "they never saw the other tokens",
            }
        );
        Ok(())
    }
}

impl fmt::Display for ActsOn {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The tokens of one pass that adapters act on.
#[derive(Debug)]
pub enum Active {
    /// The model's own on all.
    All,
    /// None: the model as it is without adapters, bit for bit.
    Off,
    /// The model's own on those at these places of the flattened batch, `[n]`, int64.
    At(Tensor),
    /// Several, each on those at its places; no place has two.
    Each(Vec<(LoraId, Tensor)>),
}

impl Active {
    /// Each of these tokens' own adapter.
    pub fn of_tokens(adapters: &[LoraId], device: Device) -> Self {
        let mut ids = adapters.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let places = |id: LoraId| {
            let places: Vec<i64> = (0..).zip(adapters).filter(|(_, of)| **of == id).map(|(place, _)| place).collect();
            Tensor::from_slice(&places).to_device(device)
        };
        match ids[..] {
            [] | [LoraId::NONE] => Self::Off,
            [LoraId::OWN] => Self::All,
            [LoraId::NONE, LoraId::OWN] => Self::At(places(LoraId::OWN)),
            _ => Self::Each(ids.into_iter().filter(|&id| id != LoraId::NONE).map(|id| (id, places(id))).collect()),
        }
    }

    /// The adapter of each of so many tokens.
    ///
    /// # Errors
    /// Where the places cannot be read.
    pub fn by_token(&self, tokens: usize) -> Result<Vec<LoraId>> {
        let mut adapters = vec![LoraId::own_if(matches!(self, Self::All)); tokens];
        let mut put = |id: LoraId, places: &Tensor| {
            for place in Vec::<i64>::try_from(places)? {
                adapters[place as usize] = id;
            }
            anyhow::Ok(())
        };
        match self {
            Self::All | Self::Off => {}
            Self::At(places) => put(LoraId::OWN, places)?,
            Self::Each(each) => each.iter().try_for_each(|(id, places)| put(*id, places))?,
        }
        Ok(adapters)
    }
}

impl Clone for Active {
    /// Shares the places.
    fn clone(&self) -> Self {
        match self {
            Self::All => Self::All,
            Self::Off => Self::Off,
            Self::At(places) => Self::At(places.shallow_clone()),
            Self::Each(each) => Self::Each(each.iter().map(|(id, places)| (*id, places.shallow_clone())).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_trained_through_everything_may_be_narrowed() {
        let rules = [ActsOn::All, ActsOn::WithImage, ActsOn::ImageTokens];
        for (trained, opened) in rules.into_iter().flat_map(|a| rules.map(|b| (a, b))) {
            let may = trained == opened || (trained, opened) == (ActsOn::All, ActsOn::WithImage);
            assert_eq!(trained.check_opened(opened).is_ok(), may, "{trained} as {opened}");
        }
        let error = ActsOn::ImageTokens.check_opened(ActsOn::All).unwrap_err().to_string();
        assert!(error.starts_with("adapters that were trained through `image_tokens` cannot act on `all`"), "{error}");
    }

    #[test]
    fn each_token_has_its_adapter() {
        let named = LoraId::named(0).unwrap();
        let (none, own) = (LoraId::NONE, LoraId::OWN);
        for adapters in
            [vec![], vec![none; 2], vec![own; 2], vec![own, none, own], vec![named; 2], vec![named, none, own]]
        {
            let active = Active::of_tokens(&adapters, Device::Cpu);
            assert_eq!(active.by_token(adapters.len()).unwrap(), adapters, "{active:?}");
            assert_eq!(matches!(active, Active::Each(_)), adapters.contains(&named));
        }
    }

    #[test]
    fn names_are_those_of_files() {
        for rule in [ActsOn::All, ActsOn::WithImage, ActsOn::ImageTokens] {
            assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
            assert_eq!(ActsOn::parse(rule.name()).unwrap(), rule);
        }
        assert_eq!(
            ActsOn::parse("images").unwrap_err().to_string(),
            "`images` is none of all, with_image, image_tokens"
        );
    }
}
