//! A tenant's id: a segment of a URL, which is its secret, too, where there are no tokens.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};

/// The most bytes of an id.
const TENANT_ID_MAX: usize = 255;

/// A tenant's id. Case counts. Logs never have it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantId(Arc<str>);

/// Why a text is no tenant's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// It is empty.
    #[error("the tenant's id is missing: /tenants/ID is expected")]
    Empty,
    /// More than one segment, or a slash within one.
    #[error("a tenant's id has no slash, nor %2F")]
    Slash,
    /// Too long.
    #[error("a tenant's id has at most {TENANT_ID_MAX} bytes")]
    TooLong,
    /// Bytes that are no text.
    #[error("a tenant's id is UTF-8")]
    NotText,
}

impl TenantId {
    /// The id in the part behind `/tenants/` of a request's path, percent-encoded.
    pub fn of_path(rest: &str) -> Result<Self, IdError> {
        let id = percent_decode_str(rest).decode_utf8().map_err(|_| IdError::NotText)?;
        Self::new(&id)
    }

    /// The id `text`.
    pub fn new(text: &str) -> Result<Self, IdError> {
        match text {
            "" => Err(IdError::Empty),
            text if text.contains('/') => Err(IdError::Slash),
            text if text.len() > TENANT_ID_MAX => Err(IdError::TooLong),
            text => Ok(Self(text.into())),
        }
    }

    /// The id as a text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for TenantId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        Self::new(&text)
    }
}

impl From<TenantId> for String {
    fn from(id: TenantId) -> Self {
        id.as_str().into()
    }
}

impl Borrow<str> for TenantId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantId")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_segment_that_is_decoded_once() {
        let id = |path: &str| TenantId::of_path(path).map(|id| id.as_str().to_owned());
        for (path, expected) in [
            ("3daf1997-d6eb-41ba-898f-ebc275da1f98", "3daf1997-d6eb-41ba-898f-ebc275da1f98"),
            ("x%20y", "x y"),
            ("%61bc", "abc"),
            ("ABC", "ABC"),
            ("a%252Fb", "a%2Fb"),
            ("a+b", "a+b"),
            ("%", "%"),
            ("%C3%A4", "\u{e4}"),
        ] {
            assert_eq!(id(path).as_deref(), Ok(expected));
        }
        for (path, expected) in [
            ("", IdError::Empty),
            ("a/b", IdError::Slash),
            ("a/", IdError::Slash),
            ("a%2Fb", IdError::Slash),
            ("a%2fb", IdError::Slash),
            ("%FF", IdError::NotText),
        ] {
            assert_eq!(id(path), Err(expected), "{path}");
        }
        assert!(id(&"%61".repeat(255)).is_ok());
        assert_eq!(id(&"a".repeat(256)), Err(IdError::TooLong));
        assert_eq!(format!("{:?}", TenantId::of_path("secret").unwrap()), "TenantId");
    }
}
