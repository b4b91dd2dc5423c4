#!/usr/bin/perl
# Runs an MCP server for a CLI that would wait for it for ever: one that says nothing within the limit is ended. Appends to a file which
# servers did not start.
# usage: mcp-start.pl FAILURES SECONDS COMMAND [ARGUMENT ...]
use strict;
use warnings;

my ($failures, $limit, @command) = @ARGV;

sub failed {
    my ($why) = @_;
    my $line = substr("\"@command\" ($why)", 0, 1000) =~ tr/\n/ /r;
    mkdir($failures =~ s{/[^/]*$}{}r);
    if (open(my $log, ">>", $failures)) {
        syswrite($log, "$line\n");
    }
    die "The MCP server $line\n";
}

pipe(my $said, my $say) or die "mcp-start: $!\n";
defined(my $server = fork) or die "mcp-start: $!\n";
if (!$server) {
    # It goes when this program does: PR_SET_PDEATHSIG.
    my $prctl = { x86_64 => 157, aarch64 => 167 }->{ (split /-/, qx(uname -m) =~ s/\s+//r)[0] };
    syscall($prctl, 1, 9, 0, 0, 0) if $prctl;
    open(STDOUT, ">&", $say);
    exec { $command[0] } @command or die "$command[0] cannot be started: $!\n";
}
close $say;
my $ready = "";
vec($ready, fileno $said, 1) = 1;
if (select($ready, undef, undef, $limit) <= 0) {
    kill "KILL", $server;
    failed("did not answer within $limit s and was ended");
}
my $answered = 0;
while (sysread($said, my $data, 65536)) {
    $answered = 1;
    while (length $data) {
        my $written = syswrite(STDOUT, $data);
        exit 1 unless defined $written;
        substr($data, 0, $written) = "";
    }
}
waitpid $server, 0;
my $status = $? & 127 ? 128 + ($? & 127) : $? >> 8;
failed("ended with status $status before it answered") unless $answered;
exit $status;
