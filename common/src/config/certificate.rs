//! The two files of a certificate, in each section that has one.

use std::path::PathBuf;

use super::diagnostics::{Diagnostics, Path};
use super::value::File;

/// A certificate and its key, below `section`: both or none.
pub(super) fn pair(
    section: &str,
    certificate: Option<File>,
    key: Option<File>,
    diagnostics: &mut Diagnostics,
) -> Option<(PathBuf, PathBuf)> {
    let mut lacks = |lacks: &str, has: &str| {
        let complaint = format!("must be set, as {section}.{has} is");
        diagnostics.error(&Path::of(section).then(lacks), &complaint);
        None
    };
    match (certificate, key) {
        (Some(certificate), Some(key)) => Some((certificate.0.into(), key.0.into())),
        (Some(_), None) => lacks("key_file", "cert_file"),
        (None, Some(_)) => lacks("cert_file", "key_file"),
        (None, None) => None,
    }
}
