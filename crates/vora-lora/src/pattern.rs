//! Patterns over module paths, as PEFT matches them.

use anyhow::{Context, Result};
use fancy_regex::Regex;

/// Whether the whole of `path`, or what follows one of its dots, matches `pattern`: PEFT's `get_pattern_key`, which
/// decides by `re.match(rf"(.*\.)?({pattern})$", path)` about `rank_pattern` and `alpha_pattern`.
///
/// An error where the pattern is no regular expression, or uses what only Python's have.
pub(crate) fn matches_end(pattern: &str, path: &str) -> Result<bool> {
    // A path as most patterns are needs no expression: of its characters only the dot means more than itself.
    if pattern.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte)) {
        let Some(start) = path.len().checked_sub(pattern.len()).filter(|&start| path.is_char_boundary(start)) else {
            return Ok(false);
        };
        let (head, tail) = path.split_at(start);
        let fits = pattern.bytes().zip(tail.bytes()).all(|(p, c)| p == c || p == b'.');
        return Ok(fits && (head.is_empty() || head.ends_with('.')));
    }
    is_match(&compile(&format!(r"^(?:.*\.)?(?:{pattern})$"), pattern)?, path)
}

/// Whether `pattern` matches the whole of `path`: `re.fullmatch`.
pub(crate) fn matches_whole(pattern: &str, path: &str) -> Result<bool> {
    is_match(&compile(&format!("^(?:{pattern})$"), pattern)?, path)
}

/// An expression with a group `idx` around the number of the layer, the first one in a path: PEFT's
/// `layers_to_transform`, whose `layers_pattern` is the name that comes before the number.
pub(crate) fn layer_number(layers_pattern: Option<&str>) -> Result<Regex> {
    match layers_pattern {
        None => compile(r"^(?:.*?\.[^.]*\.(?P<idx>\d+)\.)", ""),
        Some(pattern) => compile(&format!(r"^(?:(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.)"), pattern),
    }
}

/// An error where the search goes back and forth for too long.
fn is_match(expression: &Regex, path: &str) -> Result<bool> {
    expression.is_match(path).with_context(|| format!("`{expression}` on {path}"))
}

fn compile(expression: &str, pattern: &str) -> Result<Regex> {
    Regex::new(expression).with_context(|| format!("`{pattern}` is no regular expression that can be read here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_path_matches() {
        for (pattern, path, expected) in [
            ("q_proj", "model.layers.0.self_attn.q_proj", true),
            ("q_proj", "q_proj", true),
            ("q_proj", "eq_proj", false),
            ("q_proj", "model.q_proj.base", false),
            ("layers.1.q", "model.layers.1.q", true),
            ("layers.1.q", "model.layers.11.q", false),
            ("layers.1.q", "model.layers.1_q", true), // a dot is any character
            ("[qk]_proj", "layers.0.k_proj", true),
            (r"layers\.(0|2)\..*", "model.layers.2.mlp.up_proj", true),
            (r"layers\.(0|2)\..*", "model.layers.1.mlp.up_proj", false),
            ("^model.q", "model.q", true),
            ("^model.q", "llm.model.q", false),
            ("q|k", "layers.k", true),
            ("q", "", false),
        ] {
            assert_eq!(matches_end(pattern, path).unwrap(), expected, "{pattern} on {path}");
        }
        let error = matches_end("(q_proj", "q_proj").unwrap_err().to_string();
        assert_eq!(error, "`(q_proj` is no regular expression that can be read here");
    }

    /// What LLaMA-Factory and ms-swift write, and the like; the expected values are those of Python's `re`.
    #[test]
    fn a_pattern_may_look_ahead_and_behind() {
        let factory = r"^(?!.*(?:patch_embed|visual)).*(?:q_proj|v_proj).*";
        let swift = r"^(language_model|model.language_model)(?=\.).*\.(q_proj|v_proj)$";
        for (pattern, path, expected) in [
            (factory, "model.layers.0.self_attn.q_proj", true),
            (factory, "visual.blocks.0.q_proj", false),
            (factory, "model.layers.0.self_attn.k_proj", false),
            (swift, "model.language_model.layers.3.self_attn.v_proj", true),
            (swift, "language_models.layers.3.self_attn.v_proj", false),
            (r".*(?<!cross_attn)\.q_proj", "layers.0.self_attn.q_proj", true),
            (r".*(?<!cross_attn)\.q_proj", "layers.0.cross_attn.q_proj", false),
            (r".*(?<=self_attn\.)[qv]_proj\Z", "layers.0.self_attn.v_proj", true),
            (r"(.)\1\.q", "aa.q", true),
            (r"(.)\1\.q", "ab.q", false),
            ("q_proj", "self_attn.q_proj", false),
        ] {
            assert_eq!(matches_whole(pattern, path).unwrap(), expected, "{pattern} on {path}");
        }
        assert!(matches_end(r"layers\.(?!0\.)\d+\..*", "model.layers.10.q_proj").unwrap());
        assert!(!matches_end(r"layers\.(?!0\.)\d+\..*", "model.layers.0.q_proj").unwrap());
        let slow = matches_whole("(?i)(a|b|ab)*(?>c)", &"ab".repeat(64)).unwrap_err().to_string();
        assert!(slow.contains("on abab"), "{slow}");
    }

    #[test]
    fn the_first_number_is_the_layers() {
        let number = |pattern: Option<&str>, path: &str| {
            let found = layer_number(pattern).unwrap().captures(path).unwrap()?;
            Some(found.name("idx")?.as_str().to_owned())
        };
        assert_eq!(number(None, "model.layers.3.experts.0.up").as_deref(), Some("3"));
        assert_eq!(number(None, "layers.3.up"), None); // PEFT asks for a name before the list's
        assert_eq!(number(Some("layers"), "layers.3.up").as_deref(), Some("3"));
        assert_eq!(number(Some("h"), "model.layers.3.up"), None);
    }
}
