//! What a type says of itself in attributes: serde's names and defaults, and its doc comment.

use anyhow::{Result, anyhow};
use syn::{Attribute, Expr, Lit, Meta};

/// The attributes of serde that change what a file may hold.
#[derive(Debug, Default)]
pub struct Serde {
    pub rename: Option<String>,
    pub rename_all: Option<String>,
    pub aliases: Vec<String>,
    /// `default`, or `default = "path"`.
    pub default: Option<Option<String>>,
    pub skip: bool,
    pub flatten: bool,
    pub untagged: bool,
    pub tag: Option<String>,
}

impl Serde {
    /// Reads those of an item, field or variant.
    pub fn read(attributes: &[Attribute]) -> Result<Self> {
        let mut found = Self::default();
        for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
            attribute
                .parse_nested_meta(|meta| {
                    let name = meta.path.get_ident().map(ToString::to_string).unwrap_or_default();
                    let value = match meta.input.peek(syn::Token![=]) {
                        true => Some(meta.value()?.parse::<syn::LitStr>()?.value()),
                        false => None,
                    };
                    match (name.as_str(), value) {
                        ("rename", Some(value)) => found.rename = Some(value),
                        ("rename_all", Some(value)) => found.rename_all = Some(value),
                        ("alias", Some(value)) => found.aliases.push(value),
                        ("default", value) => found.default = Some(value),
                        ("skip" | "skip_deserializing", None) => found.skip = true,
                        ("flatten", None) => found.flatten = true,
                        ("untagged", None) => found.untagged = true,
                        ("tag", Some(value)) => found.tag = Some(value),
                        // These change no key, or how one is written only.
                        ("deny_unknown_fields" | "transparent", None)
                        | (
                            "with"
                            | "deserialize_with"
                            | "serialize_with"
                            | "skip_serializing_if"
                            | "try_from"
                            | "expecting",
                            Some(_),
                        ) => {}
                        _ => return Err(meta.error(format!("`cargo xtask docs` does not know serde's `{name}`"))),
                    }
                    Ok(())
                })
                .map_err(|error| anyhow!("line {}: {error}", error.span().start().line))?;
        }
        Ok(found)
    }

    /// The name in a file of what is called `name` in the code, inside a type that says `rename_all`.
    pub fn name(&self, name: &str, rename_all: Option<&str>) -> String {
        match (&self.rename, rename_all) {
            (Some(rename), _) => rename.clone(),
            (None, Some("lowercase")) => name.to_lowercase(),
            (None, Some("snake_case")) => separated(name, '_'),
            (None, Some("kebab-case")) => separated(name, '-'),
            (None, _) => name.to_owned(),
        }
    }
}

/// `HowMany` as `how_many`.
fn separated(name: &str, separator: char) -> String {
    let mut text = String::new();
    for (at, c) in name.char_indices() {
        if c.is_uppercase() && at > 0 {
            text.push(separator);
        }
        text.extend(c.to_lowercase());
    }
    text.replace('_', &separator.to_string())
}

/// The doc comment on one line, its links as plain code.
pub fn doc(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(syn::ExprLit { lit: Lit::Str(text), .. }) => Some(text.value().trim().to_owned()),
            _ => None,
        },
        _ => None,
    });
    unlinked(&lines.collect::<Vec<_>>().join(" "))
}

/// ``[`Type::name`]`` as `` `name` ``.
fn unlinked(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("[`") {
        let Some((path, after)) = after.split_once("`]") else { break };
        let name = path.rsplit("::").next().unwrap_or(path);
        plain = plain + before + "`" + name + "`";
        rest = after;
    }
    (plain + rest).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_serde_gives() {
        let with = |attributes: &str| {
            let item: syn::ItemStruct = syn::parse_str(&format!("{attributes} struct A;")).unwrap();
            Serde::read(&item.attrs)
        };
        let plain = with("#[serde(default, skip_serializing_if = \"Option::is_none\")]").unwrap();
        assert_eq!(plain.default, Some(None));
        assert_eq!(plain.name("HowMany", Some("snake_case")), "how_many");
        assert_eq!(plain.name("HowMany", Some("kebab-case")), "how-many");
        assert_eq!(plain.name("Pad", Some("lowercase")), "pad");
        assert_eq!(plain.name("model_type", None), "model_type");
        let renamed = with("#[serde(rename = \"type\", default = \"seed\")] #[serde(alias = \"kind\")]").unwrap();
        assert_eq!(
            (renamed.name("model_type", None).as_str(), &renamed.aliases[..]),
            ("type", &["kind".to_owned()][..])
        );
        assert_eq!(renamed.default, Some(Some("seed".to_owned())));
        let error = with("#[serde(remote = \"x\")]").unwrap_err().to_string();
        assert!(error.contains("does not know serde's `remote`"), "{error}");
    }

    #[test]
    fn docs_are_one_line_of_plain_text() {
        let item: syn::ItemStruct =
            syn::parse_str("/// Down to\n/// [`Kwargs::min_lr`], as [`x`] has it.\nstruct A;").unwrap();
        assert_eq!(doc(&item.attrs), "Down to `min_lr`, as `x` has it.");
    }
}
