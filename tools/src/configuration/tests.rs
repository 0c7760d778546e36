use super::*;
use crate::commands::receive;
use colo_ring_tests::command::Scratch;

struct File(Scratch);

impl File {
    fn new(text: &str) -> Self {
        let scratch = Scratch::new();
        fs::write(scratch.file("receive.toml"), text).unwrap();
        Self(scratch)
    }

    fn merge(&self, given: &str) -> Result<Merged, Faults> {
        let mut words: Vec<OsString> = vec!["--config".into(), self.0.file("receive.toml").into()];
        words.extend(given.split_whitespace().map(Into::into));
        merge(words, &receive::command())
    }

    /// The options that are in force.
    fn matches(&self, given: &str) -> Result<ArgMatches, String> {
        let merged = self.merge(given).map_err(|faults| faults.to_string())?;
        let command = receive::command().no_binary_name(true);
        command
            .try_get_matches_from(merged.words)
            .map_err(|error| error.to_string())
    }
}

fn raw(matches: &ArgMatches, id: &str) -> Vec<String> {
    let values = matches.get_raw(id).into_iter().flatten();
    values.map(|value| value.to_string_lossy().into_owned()).collect()
}

#[test]
fn a_file_has_the_options_of_the_command_line() {
    let file = File::new(
        "# two listeners\nlisten = [\"tcp:[::1]:4444\", \"unix:/run/x\"]\nchannels = 2\nregistered = false\n\
         sandbox = \"on\"\nram-limit = \"6G\"\nonce = true\njson = false\nkeepalive = 5\n",
    );
    let matches = file.matches("").unwrap();
    assert_eq!(raw(&matches, "listen"), ["tcp:[::1]:4444", "unix:/run/x"]);
    assert_eq!(raw(&matches, "channels"), ["2"]);
    assert_eq!(raw(&matches, "registered"), ["off"]);
    assert_eq!(raw(&matches, "ram_limit"), ["6G"]);
    assert!(matches.get_flag("once") && !matches.get_flag("json"));
}

#[test]
fn the_command_line_wins() {
    let file = File::new("listen = \"tcp:[::1]:4444\"\nchannels = 2\ncores = \"0\"\nbackend = \"epoll\"\n");
    let matches = file
        .matches("--listen unix:/run/y --channels 8 --numa-node 0")
        .unwrap();
    assert_eq!(raw(&matches, "listen"), ["unix:/run/y"]);
    assert_eq!(raw(&matches, "channels"), ["8"]);
    // What it excludes is left out, and what it does not name is not.
    assert_eq!(raw(&matches, "cores"), [""; 0]);
    assert_eq!(raw(&matches, "backend"), ["epoll"]);
    // The same the other way round: only one of the two says that it excludes the other.
    let matches = File::new("numa-node = 1\nbackend = \"epoll\"\n").matches("--listen unix:/run/y --cores 0");
    let matches = matches.unwrap();
    assert_eq!(raw(&matches, "cores"), ["0"]);
    assert_eq!(raw(&matches, "numa_node"), [""; 0]);
    assert_eq!(raw(&matches, "backend"), ["epoll"]);
}

/// Every option that `--help` shows can be in a file, but those about the command line itself.
#[test]
fn no_option_is_missing_in_files() {
    let command = receive::command();
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let name = arg.get_long().expect("options have long names");
        let value = match arg.get_action() {
            ArgAction::SetTrue => "true",
            // Refused as a value, but known as an option.
            _ => "[[]]",
        };
        let faults = File::new(&format!("{name} = {value}\n")).merge("");
        let is_unknown = faults.is_err_and(|faults| faults.to_string().contains("unknown option"));
        assert_eq!(is_unknown, NOT_IN_FILES.contains(&name), "{name}");
    }
}

#[test]
fn faults_have_their_place() {
    for (text, fault) in [
        ("listen = ", "receive.toml:1:10: "),
        ("channels = 1\nchannels = 2\n", "receive.toml:2:1: duplicate key"),
        (
            "\n  ram-limitt = \"6G\"",
            "receive.toml:2:3: unknown option \"ram-limitt\"; there is \"ram-limit\"",
        ),
        ("config = \"/x\"", "receive.toml:1:1: unknown option \"config\""),
        (
            "frobnicate = 1",
            "receive.toml:1:1: unknown option \"frobnicate\"; `colo-ring",
        ),
        ("[disks]\na = 1", "receive.toml:1:1: disks: write a text"),
        (
            "ram-limit = \"6X\"",
            "receive.toml:1:13: ram-limit: invalid value '6X'",
        ),
        ("ram-limit = 1.5", "receive.toml:1:13: ram-limit: write a text"),
        ("channels = 0x10", "receive.toml:1:12: channels: write a text"),
        ("channels = true", "receive.toml:1:12: channels: write a text"),
        ("once = \"yes\"", "receive.toml:1:8: once: write true or false"),
        (
            "backend = \"rdma\"",
            "receive.toml:1:11: backend: invalid value 'rdma'",
        ),
        (
            "listen = [\"unix:/x\", 7.5]",
            "receive.toml:1:22: listen: write a text",
        ),
        (
            "listen = \"4444\"",
            "receive.toml:1:10: listen: invalid value '4444'",
        ),
        ("'ü' = 1; x", "receive.toml:1:7: "),
    ] {
        let said = File::new(text).merge("").expect_err(text).to_string();
        assert!(said.contains(fault), "{text}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
    let both = File::new("b = 1\nchannels = 999\na = 2").merge("").unwrap_err();
    assert_eq!(both.0.len(), 3, "{both}");
}

#[test]
fn a_file_that_was_asked_for_must_be_there() {
    let words = |path: &str| vec!["--config".into(), path.into()];
    let missing = merge(words("/nonexistent/receive.toml"), &receive::command()).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("/nonexistent/receive.toml: No such file"),
        "{missing}"
    );
    let empty = merge(words("/dev/null"), &receive::command()).unwrap();
    assert_eq!(empty.configuration.unwrap().len(), 0);
}

impl File {
    /// Beside it, a guest's file of this name.
    fn guest(self, name: &str, text: &str) -> Self {
        fs::create_dir_all(self.0.file("guests.d")).unwrap();
        fs::write(self.0.path().join("guests.d").join(name), text).unwrap();
        self
    }

    /// The rules for guests.
    fn rules(&self, given: &str) -> Vec<colo_ring::receiver::GuestRule> {
        let options: Vec<_> = (raw(&self.matches(given).unwrap(), "guest").iter())
            .map(|rule| rule.parse().unwrap())
            .collect();
        GuestFile::rules(&self.merge(given).unwrap().guests, &options)
    }
}

const WEB: &str = "name = \"web3\"\npeer = \"192.0.2.7\"\ntls-allow = [\"CN=host1\"]\nprecopy-timeout = 60\n\
                   on-loss = \"own\"\non-stall = \"too\"\n";

#[test]
fn guests_have_files_of_their_own() {
    let file = File::new("on-loss = \"general\"\n")
        .guest("web.toml", WEB)
        .guest("b.toml", "name = \"db\"\nlistener = \"unix:/x\"\n")
        .guest(".c.toml", "no file")
        .guest("d.toml~", "no file");
    let guests = file.merge("").unwrap().guests;
    let names: Vec<_> = guests.iter().map(|guest| guest.name().as_str()).collect();
    assert_eq!(names, ["db", "web3"]);
    assert_eq!(
        (guests[1].on_loss(), guests[1].on_stall()),
        (Some("own"), Some("too"))
    );
    assert_eq!(guests[1].tls_allow(), ["CN=host1"]);
    assert!(guests[0].tls_allow().is_empty() && guests[0].on_loss().is_none());
    // Without a configuration, none.
    assert!(
        merge(vec!["--config=/dev/null".into()], &receive::command())
            .unwrap()
            .guests
            .is_empty()
    );
}

#[test]
fn the_command_line_wins_over_a_guests_file() {
    let file = File::new("listen = \"unix:/x\"\nprecopy-timeout = 100\n").guest("web.toml", WEB);
    let own = &file.rules("")[0];
    assert_eq!(own.precopy_deadline, Some(std::time::Duration::from_secs(60)));
    assert_eq!(own.name.to_string(), "web3,peer=192.0.2.7");
    let merged = file.merge("--precopy-timeout 5 --on-loss x").unwrap();
    assert_eq!(
        (merged.guests[0].on_loss(), merged.guests[0].on_stall()),
        (None, Some("too"))
    );
    assert_eq!(file.rules("--precopy-timeout 5")[0].precopy_deadline, None);
    // Its conditions do not, and the rest of the file holds.
    let rules = file.rules("--guest web3,peer=192.0.2.8 --guest db,peer=192.0.2.9");
    let shown: Vec<_> = rules.iter().map(|rule| rule.name.to_string()).collect();
    assert_eq!(shown, ["web3,peer=192.0.2.8", "db,peer=192.0.2.9"]);
    assert_eq!(rules[0].allowed.identities(), ["CN=host1"]);
    assert!(rules[1].allowed.identities().is_empty());
}

#[test]
fn faults_of_guests_files_have_their_places() {
    for (text, fault) in [
        (
            "name = \"a\"",
            "web.toml:1:8: a has none of listener, peer and uuid",
        ),
        (
            "name = \"a\"\npear = \"::1\"\n",
            "web.toml:2:1: unknown field `pear`",
        ),
        ("peer = \"::1\"\n", "web.toml:1:1: missing field `name`"),
        (
            "name = \"7\"\npeer = \"::1\"\n",
            "web.toml:1:8: \"7\" cannot be a guest's name",
        ),
        (
            "name = \"a\"\npeer = \"host\"\n",
            "web.toml:2:8: \"host\" is no peer",
        ),
        (
            "name = \"a\"\npeer = \"::1\"\ntls-allow = []\n",
            "web.toml:3:13: tls-allow: name an identity",
        ),
        (
            "name = \"a\"\npeer = \"::1\"\nprecopy-timeout = 0\n",
            "web.toml:3:19: precopy-timeout: write seconds",
        ),
        (
            "name = \"db\"\npeer = \"::1\"\n",
            "web.toml:1:8: db has a file already: ",
        ),
        ("name = ", "web.toml:1:"),
    ] {
        let file = File::new("")
            .guest("a.toml", "name = \"db\"\npeer = \"::2\"\n")
            .guest("web.toml", text);
        let said = file.merge("").expect_err(text).to_string();
        assert!(said.contains(fault), "{text}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
    let all = File::new("b = 1\n")
        .guest("a.toml", "a = 1\n")
        .guest("b.toml", "b = 1\n");
    assert_eq!(all.merge("").unwrap_err().0.len(), 3);
}

#[test]
fn what_has_changed_of_guests_is_said() {
    let read = |text: &str| File::new("").guest("web.toml", text).merge("").unwrap().guests;
    let changes = |text: &str| {
        let lines = GuestFile::changes(&read(WEB), &read(text));
        lines.join("; ")
    };
    assert_eq!(changes(WEB), "");
    let other = WEB.replace("host1", "host2").replace("192.0.2.7", "192.0.2.8");
    assert_eq!(
        changes(&other),
        "the guest web3 has changed: conditions, tls-allow"
    );
    assert!(
        changes(&WEB.replace("own", "another")).starts_with("on-loss or on-stall of a guest has changed")
    );
    let renamed = changes(&WEB.replace("web3", "web4"));
    assert!(
        renamed.starts_with("the guest web3 has no file any more; the guest web4 is new, of "),
        "{renamed}"
    );
}
