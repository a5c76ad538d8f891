//! From a path in a type or an expression to the item it names.

use syn::Item;

use house::resolve::Named;
use house::sources::{ModuleId, NamePath, Sources};

/// An item, and where it is declared.
#[derive(Clone, Copy)]
pub struct Declared<'a> {
    pub module: ModuleId,
    pub name: &'a str,
    pub item: &'a Item,
}

impl<'a> Declared<'a> {
    /// The item that `path`, written in `module`, names; for a variant its enum. None where no crate here declares it.
    pub fn find(sources: &'a Sources, module: ModuleId, path: &syn::Path) -> Option<Self> {
        let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        let found = sources.resolve(module, &NamePath { absolute: path.leading_colon.is_some(), names });
        found.into_iter().find_map(|found| match found.named {
            Named::Item(id) => {
                let definition = &sources.items[id];
                let code = &sources.modules[definition.module].code;
                let item = code.iter().find(|item| name(item).is_some_and(|name| *name == definition.name))?;
                Some(Self { module: definition.module, name: &definition.name, item })
            }
            _ => None,
        })
    }

    /// `crate_name::a::Item`
    pub fn path(&self, sources: &Sources) -> String {
        format!("{}::{}", sources.path_of(self.module), self.name)
    }
}

fn name(item: &Item) -> Option<&syn::Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Struct(item) => Some(&item.ident),
        _ => None,
    }
}
