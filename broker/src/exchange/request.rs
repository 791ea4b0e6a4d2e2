//! A router's request, parsed from the body. No IO.

use std::collections::BTreeSet;

use wgkex_common::{Domain, KeyId};

use crate::exchange::Rejection;

/// Reads a router's request (contract section 1): JSON, with fields that wgkex does not know ignored.
pub fn parse(body: &[u8], domains: &BTreeSet<Domain>) -> Result<KeyId, Rejection> {
    let json: serde_json::Value =
        serde_json::from_slice(body).map_err(|_| Rejection::Body("the body is not valid JSON"))?;
    let object = json.as_object().ok_or(Rejection::Body("the body is not a JSON object"))?;
    let text = |name, missing| object.get(name).and_then(|value| value.as_str()).ok_or(Rejection::Body(missing));
    let domain = text("domain", "domain: a text is expected")?;
    let key = text("public_key", "public_key: a text is expected")?;
    let domain = domains.get(domain).cloned().ok_or(Rejection::Domain)?;
    Ok(KeyId { domain, key: key.parse().map_err(Rejection::Key)? })
}

/// The domain in a router's request, unchecked.
#[must_use]
pub fn domain(body: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(json.get("domain")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "TszFS3oFRdhsJP3K0VOlklGMGYZy+oFCtlaghXJqW2g=";

    #[test]
    fn a_routers_request_is_read_as_the_original_reads_it() {
        let domains: BTreeSet<_> = [Domain::new("ff_a", &["ff_".into()]).unwrap()].into();
        let parse = |body: &str| parse(body.as_bytes(), &domains);
        let id = KeyId { domain: domains.first().unwrap().clone(), key: KEY.parse().unwrap() };
        for body in [
            format!(r#"{{"domain":"ff_a","public_key":"{KEY}"}}"#),
            format!(r#" {{ "public_key" : "{KEY}" , "domain" : "ff_a" , "location": null }} "#),
            format!(r#"{{"domain":"x","domain":"ff_a","public_key":"{KEY}"}}"#),
            format!(r#"{{"domain":"ff\u005fa","public_key":"{KEY}"}}"#),
        ] {
            assert_eq!(parse(&body), Ok(id.clone()), "{body}");
        }
        for (body, reason) in [
            (String::new(), "body"),
            ("x".into(), "body"),
            ("null".into(), "body"),
            ("[]".into(), "body"),
            ("{}".into(), "body"),
            (format!("domain=ff_a&public_key={KEY}"), "body"),
            (format!(r#"{{"domain":1,"public_key":"{KEY}"}}"#), "body"),
            (r#"{"domain":"ff_a","public_key":null}"#.into(), "body"),
            (format!(r#"{{"domain":"ff_b","public_key":"{KEY}"}}"#), "domain"),
            (format!(r#"{{"domain":"","public_key":"{KEY}"}}"#), "domain"),
            (r#"{"domain":"ff_a","public_key":""}"#.into(), "key"),
            (format!(r#"{{"domain":"ff_a","public_key":"{KEY}\n"}}"#), "key"),
            (r#"{"domain":"ff_a","public_key":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#.into(), "key"),
            ("[".repeat(4096), "body"),
        ] {
            let rejection = parse(&body).unwrap_err();
            assert_eq!(rejection.reason(), reason, "{body}");
            assert!(!rejection.to_string().contains("ff_b"), "what was sent is not echoed");
        }
    }
}
