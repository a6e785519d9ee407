//! Key URIs: `aws-kms://arn:…`, cosign's `awskms://[endpoint]/[id|arn|alias/…]`, `file:///…`, PEM.

use std::fmt;
use std::path::PathBuf;

/// Where a rule's public key comes from.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum KeyUri {
    /// A key in AWS KMS.
    Kms(KmsKey),
    /// A PEM file on this node (absolute path).
    File(PathBuf),
    /// A PEM public key written into the configuration.
    Inline(String),
}

/// A key in AWS KMS, as the URI names it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct KmsKey {
    /// `https://host[:port]` from cosign's form with an endpoint.
    pub endpoint: Option<String>,
    /// Key id, key ARN, `alias/…` or alias ARN: what KMS calls `KeyId`.
    pub id: String,
}

impl KmsKey {
    /// The Region that an ARN names (`arn:partition:kms:REGION:account:resource`).
    pub fn region(&self) -> Option<&str> {
        self.id.starts_with("arn:").then(|| self.id.split(':').nth(3)).flatten()
    }

    /// The last part: `key/<id>` or `alias/<name>` of an ARN, else the id itself.
    pub fn resource(&self) -> &str {
        if self.id.starts_with("arn:") { self.id.splitn(6, ':').nth(5).unwrap_or("") } else { &self.id }
    }

    /// Aliases can be re-pointed at another key; ids can't.
    pub fn is_alias(&self) -> bool {
        self.resource().starts_with("alias/")
    }

    /// Multi-Region keys have the same id, and the same key material, in every Region.
    pub fn is_multi_region(&self) -> bool {
        self.resource().trim_start_matches("key/").starts_with("mrk-")
    }

    /// The same multi-Region key in another Region. An endpoint is one Region's.
    pub fn in_region(&self, region: &str) -> Self {
        let endpoint = self.endpoint.clone().filter(|_| self.region() == Some(region));
        let mut parts: Vec<&str> = self.id.splitn(6, ':').collect();
        if let [.., place, _, _] = parts.as_mut_slice() {
            *place = region;
        }
        Self { endpoint, id: parts.join(":") }
    }
}

impl KeyUri {
    /// Reads a key URI; the error is a sentence for a person.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with("-----BEGIN ") {
            return inline(text);
        }
        if let Some(path) = text.strip_prefix("file://") {
            return match path.starts_with('/') {
                true => Ok(Self::File(path.into())),
                false => Err("a file key needs an absolute path: file:///etc/pullgate/keys/ci.pem".into()),
            };
        }
        if let Some(id) = text.strip_prefix("aws-kms://") {
            return Ok(Self::Kms(kms(None, id.trim_start_matches('/'))?));
        }
        if let Some(rest) = text.strip_prefix("awskms://") {
            let (host, id) = rest.split_once('/').ok_or("expected awskms:///KEY or awskms://ENDPOINT/KEY")?;
            let endpoint = (!host.is_empty()).then(|| format!("https://{host}"));
            return Ok(Self::Kms(kms(endpoint, id)?));
        }
        Err("expected aws-kms://ARN, awskms:///KEY, file:///PATH.pem or a PEM public key".into())
    }

    /// What cosign is given to sign with it (`cosign sign --key`); of other keys than KMS's only the
    /// public half is known.
    pub fn for_signing(&self) -> Option<String> {
        match self {
            Self::Kms(KmsKey { endpoint: None, id }) => Some(format!("awskms:///{id}")),
            Self::Kms(_) => Some(self.label()),
            Self::File(_) | Self::Inline(_) => None,
        }
    }

    /// The SHA-256 or name by which journal and messages know this key; never key material.
    pub fn label(&self) -> String {
        match self {
            // The same alias at two endpoints is two keys.
            Self::Kms(KmsKey { endpoint: Some(endpoint), id }) => {
                format!("awskms://{}/{id}", endpoint.trim_start_matches("https://"))
            }
            Self::Kms(key) => format!("aws-kms://{}", key.id),
            Self::File(path) => format!("file://{}", path.display()),
            Self::Inline(_) => "inline PEM key".into(),
        }
    }
}

impl fmt::Display for KeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label())
    }
}

fn inline(text: &str) -> Result<KeyUri, String> {
    let block = pem::parse(text).map_err(|e| format!("the PEM block can't be read: {e}"))?;
    match block.tag() {
        "PUBLIC KEY" => Ok(KeyUri::Inline(text.to_owned())),
        tag if tag.contains("PRIVATE") => {
            Err("this is a private key; give the public key (cosign public-key --key …)".into())
        }
        tag => Err(format!("expected a PEM block `PUBLIC KEY`, found `{tag}`")),
    }
}

fn kms(endpoint: Option<String>, id: &str) -> Result<KmsKey, String> {
    let key = KmsKey { endpoint, id: id.to_owned() };
    let is_id =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-".contains(&b));
    if !id.starts_with("arn:") {
        return match is_id(id) {
            true => Ok(key),
            false => Err(format!("`{id}` is neither a KMS key id, an alias/NAME nor an ARN")),
        };
    }
    let parts: Vec<&str> = id.splitn(6, ':').collect();
    match parts.as_slice() {
        ["arn", partition, "kms", region, account, resource] => {
            let account_ok = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
            let resource_ok = ["key/", "alias/"].iter().any(|p| resource.strip_prefix(p).is_some_and(is_id));
            match (partition.starts_with("aws"), region.is_empty(), account_ok, resource_ok) {
                (true, false, true, true) => Ok(key),
                (_, _, false, _) => Err(format!("the account `{account}` in the ARN is not 12 digits")),
                (_, _, _, false) => Err(format!("`{resource}` in the ARN is neither key/ID nor alias/NAME")),
                _ => Err(format!("`{id}` has no known partition or no Region")),
            }
        }
        _ => Err(format!("`{id}` is not a KMS ARN: arn:aws:kms:REGION:ACCOUNT:key/ID")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:kms:us-west-2:123456789012:key/mrk-aaaa";

    fn kms_of(text: &str) -> KmsKey {
        match KeyUri::parse(text) {
            Ok(KeyUri::Kms(key)) => key,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn both_kms_schemes_name_the_same_key() {
        assert_eq!(kms_of(&format!("aws-kms://{ARN}")), kms_of(&format!("awskms:///{ARN}")));
        assert_eq!(kms_of("awskms:///alias/ci").id, "alias/ci");
        assert_eq!(
            kms_of("awskms://kms.example.com:8443/alias/ci").endpoint.as_deref(),
            Some("https://kms.example.com:8443")
        );
    }

    #[test]
    fn an_alias_at_two_endpoints_is_two_keys() {
        let label = |text: &str| KeyUri::parse(text).unwrap().label();
        let (one, two) = ("awskms://one.example.com/alias/ci", "awskms://two.example.com:8443/alias/ci");
        assert_eq!((label(one).as_str(), label(two).as_str()), (one, two));
        assert_eq!(label("awskms:///alias/ci"), "aws-kms://alias/ci");
    }

    #[test]
    fn an_endpoint_is_for_its_own_region_alone() {
        let key = kms_of(&format!("awskms://kms.example.com/{ARN}"));
        assert_eq!(key.in_region("us-west-2"), key);
        assert_eq!(key.in_region("eu-west-1").endpoint, None);
    }

    #[test]
    fn arns_give_region_and_kind_in_every_partition() {
        let key = kms_of("aws-kms://arn:aws-cn:kms:cn-north-1:123456789012:alias/ci");
        assert_eq!(key.region(), Some("cn-north-1"));
        assert!(key.is_alias() && !key.is_multi_region());
        let mrk = kms_of(&format!("aws-kms://{ARN}"));
        assert!(mrk.is_multi_region());
        assert_eq!(mrk.in_region("eu-west-1").id, "arn:aws:kms:eu-west-1:123456789012:key/mrk-aaaa");
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (text, part) in [
            ("https://kms/key", "expected aws-kms://"),
            ("file://relative.pem", "absolute path"),
            ("aws-kms://arn:aws:kms:us-west-2:1234:key/a", "12 digits"),
            ("aws-kms://arn:aws:s3:::bucket", "not a KMS ARN"),
            ("aws-kms://arn:aws:kms:us-west-2:123456789012:bucket/a", "neither key/ID nor alias/NAME"),
            ("awskms:///", "neither a KMS key id"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "found `CERTIFICATE`"),
            ("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----", "private key"),
        ] {
            let error = KeyUri::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn cosign_signs_with_kms_keys_by_its_own_spelling() {
        let arn = "arn:aws:kms:us-west-2:123456789012:key/aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";
        let signing = |text: &str| KeyUri::parse(text).unwrap().for_signing();
        assert_eq!(signing(&format!("aws-kms://{arn}")), Some(format!("awskms:///{arn}")));
        assert_eq!(signing("awskms:///alias/ci").as_deref(), Some("awskms:///alias/ci"));
        assert_eq!(
            signing("awskms://kms.lan:4566/alias/ci").as_deref(),
            Some("awskms://kms.lan:4566/alias/ci")
        );
        assert_eq!(signing("file:///etc/pullgate/keys/ci.pub"), None);
    }
}
